"""Makes the Triton kernels importable as `fastlm.kernels`, from a wheel (fastlm/kernels/) or a checkout (kernels/)."""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()][:1]
