"""What is kept of compiled kernels, under a driver that launches nothing: what Triton itself would choose."""

from __future__ import annotations

from conftest import run_python

PROGRAM = """if True:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Utils:
        def get_device_properties(self, device): return {"max_shared_mem": 1 << 18}
        def load_binary(self, name, kernel, shared, device): return 1, 2, 32, 0, 1024

    launched = []

    class Launcher:
        def __init__(self, src, metadata): self.kernel = metadata.hash
        def __call__(self, *args): launched.append((self.kernel, args[:3], args[9:]))

    class Driver:
        utils, launcher_cls = Utils(), Launcher
        def get_current_device(self): return 0
        def get_current_stream(self, device): return 0
        def get_current_target(self): return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    from dlcore.triton import launch, rng

    asked = []
    run = type(rng.fold_in_kernel).run
    type(rng.fold_in_kernel).run = lambda self, *args, **kwargs: asked.append(1) or run(self, *args, **kwargs)

    def calls(kernel, grid, *args, **meta):
        # What Triton launches, and what is launched twice by us.
        kernel[grid](*args, **meta)
        for _ in range(2):
            launch.launch(kernel, grid, args[0], *args, **meta)
        triton, first, second = launched[-3:]
        assert first[0] == second[0] == triton[0], (kernel.__name__, args)
        assert first[1:] == second[1:] == triton[1:]
        return triton[0]

    keys = torch.zeros(9, 2, dtype=torch.int64)
    out = torch.zeros(64)
    found = set()
    for key in (keys, keys.view(-1)[1:]):
        for to in (out, out[1:], out.double()):
            for count in (16, 1, 7, 2**40):
                found.add(calls(rng.fold_in_kernel, (3,), key, to.long(), to, count, BLOCK=128))
    found.add(calls(rng.fold_in_kernel, (3, 2), keys, keys, out, 16, BLOCK=64))
    found.add(calls(rng.fold_in_kernel, (3, 2), keys, keys, out, 16, BLOCK=64, num_warps=8))
    # Two alignments of keys, three results, numbers of 32 and of 64 bits; another block, more warps.
    assert len(found) == 2 * 3 * 2 + 2, len(found)
    before = len(asked)
    launch.launch(rng.fold_in_kernel, 3, keys, keys, out.long(), out, 7, BLOCK=128)
    assert len(asked) == before
    print("same")
"""


def test_kept_kernels_are_those_that_triton_would_choose(tmp_path):
    said = run_python(PROGRAM, TRITON_INTERPRET="", TRITON_CACHE_DIR=str(tmp_path))
    assert said.strip() == "same"
