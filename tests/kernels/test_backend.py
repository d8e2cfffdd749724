"""Choice of the backend, and the process after the extension is loaded."""

import subprocess
import sys
import warnings

import pytest
import torch
import triton

import rlhf_kernels
from rlhf_kernels import _native, backend, gae, info
from rlhf_kernels._options import PPOArguments
from rlhf_kernels.backend import choose, resolve
from rlhf_kernels.launch_args import PpoScalars


def test_the_extension_is_built():
    assert _native.AVAILABLE, _native.why_missing()


def test_auto_selects_a_backend_and_gives_a_reason():
    cpu = torch.device("cpu")
    assert choose("gae", cpu, torch.bfloat16).backend == "cpu"
    assert (
        choose("gae", cpu, torch.float64).backend == "reference"
        and "float64" in choose("gae", cpu, torch.float64).reason
    )
    assert choose("gae", torch.device("meta"), torch.float32).backend == "reference"


def test_a_requested_backend_runs_or_raises():
    x = torch.zeros(2, dtype=torch.float64)
    assert resolve("gae", "reference", x) == "reference"
    with pytest.raises(ValueError, match="backend: 'cpu' cannot serve this call: the kernels take float32"):
        resolve("gae", "cpu", x)
    with pytest.raises(ValueError, match="backend: got 'cuda9', expected 'auto' or one of"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), backend="cuda9")


_ONE, _ID = torch.zeros(1), torch.zeros(1, dtype=torch.long)
_OBJECTIVE = {"ids": _ID, "old_logprobs": _ONE, "advantages": _ONE, "mask": _ONE.bool()}


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("token_logprobs", {"ids": _ID}),
        ("linear_token_logprobs", {"ids": _ID}),
        ("logits_ppo_loss", _OBJECTIVE),
        ("linear_ppo_loss", _OBJECTIVE),
        ("sample_tokens", {"seed": 0, "sequence": _ID, "position": _ID}),
    ],
)
def test_a_row_too_long_for_the_gpu_kernels(monkeypatch, op, arguments):
    """The error is raised before any kernel runs, so the two gigabytes of the row are never read."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    vocabulary = 2**30 + 1
    if op.startswith("linear"):
        rows = (torch.zeros(1, 1, dtype=torch.bfloat16), torch.empty(vocabulary, 1, dtype=torch.bfloat16))
    else:
        rows = (torch.empty(1, vocabulary, dtype=torch.bfloat16),)
    message = f"{op}: got a vocabulary of {vocabulary}, expected at most {2**30} for triton"
    with pytest.raises(ValueError, match=message):
        getattr(rlhf_kernels, op)(*rows, **arguments, backend="triton")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """In a fresh process, after parallel regions of both torch and the extension have run."""
    code = (
        "import torch, rlhf_kernels; from rlhf_kernels import info;"
        "x = torch.randn(64, 5000); (x @ x.t()).sum();"
        "rlhf_kernels.token_logprobs(x, torch.zeros(64, dtype=torch.long));"
        "print(len(info.openmp_runtimes()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "1"
    )


def test_info_names_every_op(capsys):
    info.main([])
    printed = capsys.readouterr().out
    for op in info.ops.__all__:
        assert any(line.startswith(op) for line in printed.splitlines())
    assert f"instruction set {_native.extension().isa()}" in printed


def test_a_missing_extension_is_explained():
    """Without the extension the package imports; "auto" gives the reason for the reference, and "cpu" raises."""
    code = (
        "import sys; sys.modules['rlhf_kernels._C'] = None\n"
        "import torch, rlhf_kernels as rk\n"
        "from rlhf_kernels.backend import choose\n"
        "assert rk.masked_mean(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 1\n"
        "print(choose('gae', torch.device('cpu'), torch.float32).reason)\n"
        "try: rk.masked_mean(torch.ones(3), torch.ones(3, dtype=torch.bool), backend='cpu')\n"
        "except ValueError as e: print(e)\n"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2 and all("rlhf_kernels._C does not load" in line and "pip install" in line for line in lines)


@pytest.fixture
def fresh_reasons():
    """Clear the caches of `why_no_triton` and `why_no_cuda`, which otherwise keep their result for the process."""
    for reason in (backend.why_no_triton, backend.why_no_cuda):
        reason.cache_clear()
    yield
    for reason in (backend.why_no_triton, backend.why_no_cuda):
        reason.cache_clear()


def test_an_old_triton_is_refused(monkeypatch, fresh_reasons):
    monkeypatch.setattr(triton, "__version__", "3.4.2")
    with pytest.raises(
        ValueError, match=r"'triton' cannot serve this call: triton 3\.4\.2 is too old; install triton >= 3\.5"
    ):
        resolve("gae", "triton", torch.zeros(2))


def test_an_old_chip_is_refused(monkeypatch, fresh_reasons):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(_native, "_C", type("Built", (), {"cuda_architectures": staticmethod(lambda: [80, 90, 100])}))
    reason = backend.why_no_cuda("gae", torch.device("cuda"))
    assert reason == "its kernels are built for sm_80, sm_90, sm_100, this device is sm_75"


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_tensors_on_a_wrong_device_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot serve this call: the tensors are on meta"):
        resolve("gae", name, torch.zeros(2, device="meta"))


def test_the_bindings_have_every_scalar_by_name():
    """The table in _options.py and the list in csrc/math/ppo.h have the same names."""
    scalars = PpoScalars.of(PPOArguments())._asdict()
    make = _native.extension().PpoScalars
    make(**scalars)
    for name in scalars:
        with pytest.raises(KeyError):
            make(**{k: v for k, v in scalars.items() if k != name})
    with pytest.raises(TypeError, match=r"unknown keyword; csrc/math/ppo\.h lists the names"):
        make(**scalars, more=1.0)


def test_the_reference_is_imported_on_first_use():
    code = (
        "import sys, torch, rlhf_kernels as rk\n"
        "x, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)\n"
        "rk.masked_mean(x, mask)\n"
        "assert not [m for m in sys.modules if 'rlhf_kernels.reference' in m]\n"
        "rk.masked_mean(x, mask, backend='reference')\n"
        "assert 'rlhf_kernels.reference' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("clone", [True, False])
def test_a_missing_extension_is_reported_once_with_what_to_do(monkeypatch, tmp_path, clone):
    monkeypatch.setattr(_native, "AVAILABLE", False)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "rlhf_kernels" / "_native.py"))
    if clone:
        (tmp_path / "setup.py").touch()
    backend._warn_once.cache_clear()
    x, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.warns(RuntimeWarning, match="without fused kernels") as found:
        gae(x, x, mask)
        rlhf_kernels.kl_penalty(x, x)
    text = str(found[0].message)
    assert (
        len(found) == 1
        and (f"run `pip install -e {tmp_path}`, or start Python in a different folder" in text) == clone
        and ("install the package again" in text) != clone
    )
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        backend._warn_once.cache_clear()
        gae(x, x, mask, backend="reference")
        gae(x.double(), x.double(), mask)
    assert not later
    backend._warn_once.cache_clear()
