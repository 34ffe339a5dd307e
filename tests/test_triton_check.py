"""What `make gpu-check` checks, and that it finds what it should."""

from __future__ import annotations

import pytest
import torch
from conftest import run_python

from dlcore.triton import check, launch, rng

GOOD = check.Usage("rng", "fill_kernel", "", 80, 60, 0, 0)


def test_complaints():
    assert GOOD.complaint() is None
    assert GOOD._replace(spilled=8).complaint() == "spills 8 bytes a thread"
    assert GOOD._replace(family="attention", spilled=8).complaint() is None
    assert GOOD._replace(family="sphere_velocity", spilled=8).complaint() == "spills 8 bytes a thread"
    too_much = GOOD._replace(family="attention", shared=(99 << 10) + 1)
    assert "wants 101377 bytes of shared memory of 101376" in str(too_much.complaint())
    large = too_much._replace(family="attention_backward", constants="fp32 HEADS=2 DIM=512 VALUE_DIM=512")
    assert large.complaint() is None
    assert "of 166912" in str(large._replace(shared=(163 << 10) + 1).complaint())
    assert large._replace(constants=f"bf16 {large.constants}").complaint() is not None
    assert too_much._replace(target=90).complaint() is None


@pytest.mark.slow
def test_a_kernel_that_no_example_launches_is_found():
    code = (
        "from dlcore.triton import check, rng\n"
        "found = [x for family in check.modules() for group in check.launches(family) for x in group]\n"
        "without = [x for x in found if x.kernel is not rng.fold_in_kernel]\n"
        "print(check.missed(found), check.missed(without))\n"
    )
    assert run_python(code, TRITON_INTERPRET="").strip() == "[] ['fold_in_kernel']"


@pytest.mark.slow
def test_each_target_gets_what_it_would_run():
    """16-bit attention is described from 9.0 on."""
    code = (
        "from dlcore.triton import check\n"
        "for variant in check.launches('attention_backward'):\n"
        "    if variant[0].kernel.__name__ == 'grad_q_kernel':\n"
        "        for x, target in zip(variant, check.TARGETS):\n"
        "            print(target, 'fp32' in str(check._source(x)[1]['q_ptr']), x.meta['DESCRIBED'])\n"
    )
    said = set(run_python(code, TRITON_INTERPRET="").splitlines())
    assert said == {
        *("80 False False", "90 False True", "100 False True"),
        *("80 True False", "90 True False", "100 True False"),
    }


def test_examples_wait_for_no_number():
    """Tensors of the meta device have none: a host function that reads one raises here."""
    key = torch.empty(2, dtype=torch.int64, device="meta")
    with launch.recording() as found:
        rng.normal(key, [5], torch.float32)
        rng.normal(key, [0], torch.float32)
    assert [x.kernel for x in found] == [rng.fill_kernel]


def test_spills_and_shared_memory_are_read_off_the_compiler(tmp_path):
    """A kernel that must spill, and one that wants more shared memory than a program may have."""
    (tmp_path / "greedy.py").write_text(
        "import torch, triton, triton.language as tl\n"
        "from dlcore.triton import check\n"
        "from dlcore.triton.launch import Launch\n"
        "@triton.jit\n"
        "def spilling(x, out):\n"
        "    at = tl.arange(0, 64)[:, None] * 128 + tl.arange(0, 64)[None, :]\n"
        "    a, b = tl.load(x + at), tl.load(x + 9000 + at)\n"
        "    for i in range(3):\n"
        "        b = tl.exp(a + b * i) + tl.sum(a); a = a + tl.sum(b)\n"
        "    tl.store(out + at, a); tl.store(out + at + 9000, b)\n"
        "@triton.jit\n"
        "def sharing(x, out):\n"
        "    i, k = tl.arange(0, 16), tl.arange(0, 2048)\n"
        "    a = tl.load(x + i[:, None] * 2048 + k[None, :])\n"
        "    b = tl.load(out + k[:, None] * 16 + i[None, :])\n"
        "    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(a, b))\n"
        "x = torch.empty(1, device='meta')\n"
        "for kernel, warps in ((spilling, 1), (sharing, 8)):\n"
        "    row = check.usage('rng', Launch(kernel, (x, x), {'num_warps': warps}), 80)\n"
        "    print(kernel.__name__, row.complaint())\n"
    )
    out = run_python(f"import runpy; runpy.run_path({str(tmp_path / 'greedy.py')!r})", TRITON_INTERPRET="")
    assert "spilling spills" in out
    assert "sharing wants" in out


@pytest.mark.slow
def test_the_command():
    """One family; `make gpu-check` takes them all."""
    out = run_python(
        "from dlcore.triton import check; print('code', check.main(['rng']))", TRITON_INTERPRET=""
    )
    assert "rng.fill_kernel [fp64 KIND=1 ROWS=1 BLOCK=2048]" in out
    assert out.endswith("code 0\n"), out
    out = run_python(
        "from dlcore.triton import check; print('code', check.main(['rng']))", TRITON_INTERPRET="1"
    )
    assert "TRITON_INTERPRET is set" in out
    assert "code 2" in out
