"""The compiled backend: tensors handed to `dlcore._C` as addresses, shapes and strides."""
