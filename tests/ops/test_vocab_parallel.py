"""The losses over a group that divides the vocabulary, in two processes over gloo, against one process with all of it.

Run by the test as `test_vocab_parallel.py RANK FOLDER` too: every check, as JSON.
"""

import json
import random
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script

from fastlm import ops
from fastlm.ops import vocab_parallel
from tests.ops.test_linear_cross_entropy_options import COMBINATIONS, _chosen, _covering, _tensors
from tests.two_ranks import results_of, run_both

ROWS, WIDTH, CLASSES = 7, 8, 150
PARTS = {"even": (75, 75), "uneven": (130, 20), "one class": (149, 1)}


def _own(t, parts):
    """This rank's rows of a tensor over classes."""
    return None if t is None else t.split(list(parts))[dist.get_rank()].detach().clone()


def _graded(fn, inputs, seed=2):
    """Outputs of fn(*inputs) and gradients under fixed random cotangents; twice, over the same graph."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    outs = fn(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    live = [o for o in outs if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    up = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in live]
    given = [t for t in leaves if t is not None]
    first, second = (torch.autograd.grad(live, given, up, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "a second backward gave other gradients"
    for leaf, t in zip(leaves, inputs):
        assert t is None or torch.equal(leaf, t), "an input was changed"
    return outs, list(first)


def _compare(run, input, weight, bias, parts, dtype, what):
    """run(input, weight, bias, group=..., own=...) over the group against one process: outputs, whole and own gradients."""
    own = lambda t: _own(t, parts)  # noqa: E731
    outs, grads = _graded(lambda *a: run(*a, group=dist.group.WORLD, own=own), (input, own(weight), own(bias)))
    want, whole = _graded(lambda *a: run(*a, group=None, own=lambda t: t), (input, weight, bias))
    expected = [*want, whole[0], *(own(g) for g in whole[1:])]
    close = {} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    for index, (g, w) in enumerate(zip([*outs, *grads], expected, strict=True)):
        torch.testing.assert_close(g, w, **close, msg=lambda m, i=index: f"{what}: result {i}: {m}")
    # Whatever is not divided is the same on every rank, to the bit.
    for t in (*outs, grads[0]):
        if t.is_floating_point():
            other = t.detach().clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, t), f"{what}: ranks differ"


def check_cross_entropy(backend, dtype, parts, combinations):
    for options in combinations:
        input, weight, bias, *others = _tensors(dtype, "cpu", ROWS, WIDTH, CLASSES)
        target, keywords = _chosen(options, *others)
        class_weight = keywords.pop("weight")

        def run(h, w, b, group, own, target=target, keywords=keywords, class_weight=class_weight):
            return ops.linear_cross_entropy(
                h, w, target, linear_bias=b, weight=own(class_weight), logits_bytes=3 * CLASSES * 8,
                group=group, backend=backend if group else "reference", **keywords,
            )  # fmt: skip

        _compare(run, input, weight, bias if options["bias"] else None, parts, dtype, f"{backend} {options}")


def check_logprobs(backend, dtype, parts):
    input, weight, bias, target, *_ = _tensors(dtype, "cpu", ROWS, WIDTH, CLASSES)
    target[1] = -100
    for options in ({}, {"scale": 0.7, "softcap": 4.0}):

        def run(h, w, b, group, own, options=options):
            return tuple(ops.linear_logprobs(h, w, target, linear_bias=b, logits_bytes=3 * CLASSES * 8, group=group,
                                             backend=backend if group else "reference", **options))  # fmt: skip

        _compare(run, input, weight, bias, parts, dtype, f"{backend} {options}")


def check_no_target_here(backend):
    """All targets among the first rank's classes; then none at all."""
    for ignored in (False, True):
        input, weight, bias, target, *_ = _tensors(torch.float32, "cpu", ROWS, WIDTH, CLASSES)
        target = target % 20 if not ignored else torch.full_like(target, -100)

        def run(h, w, b, group, own, target=target):
            return ops.linear_cross_entropy(
                h, w, target, linear_bias=b, label_smoothing=0.1, group=group, backend=backend
            )

        _compare(run, input, weight, bias, (130, 20), torch.float32, f"ignored {ignored}")


def check_a_part_ruled_out(backend):
    """A bias of -inf on all classes of a rank."""
    input, weight, bias, target, *_ = _tensors(torch.float32, "cpu", ROWS, WIDTH, CLASSES)
    bias[130:] = float("-inf")

    def run(h, w, b, group, own):
        found = ops.linear_logprobs(h, w, target % 130, linear_bias=b, group=group, backend=backend)
        return *found[:3], ops.linear_cross_entropy(h, w, target % 130, linear_bias=b, group=group, backend=backend)

    _compare(run, input, weight, bias, (130, 20), torch.float32, "a part ruled out")


def check_a_shared_offset(backend):
    """Sums of logits of 1e5 have no digits of their differences left in fp32; the two parts have different maxima."""
    input, target = torch.ones(ROWS, 1), torch.tensor([0, 70, 129, 130, 140, 149, -100])
    weight = (1e5 + torch.arange(CLASSES) % 7 + 5.0 * (torch.arange(CLASSES) >= 130))[:, None]
    part = _own(weight, (130, 20))
    for class_weight in (None, torch.rand(CLASSES)):
        options = {"label_smoothing": 0.5, "reduction": "none"}
        want = torch.nn.functional.cross_entropy(
            (input @ weight.T).double(), target, None if class_weight is None else class_weight.double(), **options
        )
        got = ops.linear_cross_entropy(
            input, part, target, weight=_own(class_weight, (130, 20)), group=dist.group.WORLD,
            backend=backend, **options,
        )  # fmt: skip
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


def check_16_bits(backend, dtype):
    """bf16 and fp16: as close to fp64 as one process is, up to the rounding of the sum of two parts of input's gradient."""
    input, weight, bias, target, *_ = _tensors(dtype, "cpu", ROWS, WIDTH, CLASSES)
    parts = PARTS["uneven"]

    def run(h, w, b, target=target, **kw):
        return ops.linear_cross_entropy(h, w, target, linear_bias=b, z_loss=0.02, **kw)

    outs, grads = _graded(lambda *a: run(*a, group=dist.group.WORLD, backend=backend),
                          (input, _own(weight, parts), _own(bias, parts)))  # fmt: skip
    alone, mine = _graded(lambda *a: run(*a, backend=backend), (input, weight, bias))
    exact, right = _graded(lambda *a: run(*a, backend="reference"), [t.double() for t in (input, weight, bias)])
    right, mine = ([gs[0], *(_own(g, parts) for g in gs[1:])] for gs in (right, mine))
    for got, want, base in zip([*outs, *grads], [*exact, *right], [*alone, *mine]):
        error, allowed = (got.double() - want).abs().max(), 2 * (base.double() - want).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps * want.abs().max(), (error, allowed)


def check_autocast_and_errors(backend):
    input, weight, bias, target, *_ = _tensors(torch.float32, "cpu", ROWS, WIDTH, CLASSES)
    own = _own(weight, PARTS["even"]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(input, own, target, group=dist.group.WORLD, backend=backend)
    loss.backward()
    assert loss.dtype == own.grad.dtype == torch.float32
    for op in (ops.linear_cross_entropy, ops.linear_logprobs):
        with pytest.raises(ValueError, match=r"target must be in \[0, 150\) or ignore_index=-100, got 150"):
            op(input, own, torch.full_like(target, CLASSES), group=dist.group.WORLD, backend=backend)


def check_planted_bug_is_seen(name, wrong):
    """With a piece of vocab_parallel replaced the check fails, on both ranks and so in step."""
    owner, attribute = (vocab_parallel._Part, name) if hasattr(vocab_parallel._Part, name) else (vocab_parallel, name)
    right = getattr(owner, attribute)
    setattr(owner, attribute, wrong)
    try:
        with pytest.raises(AssertionError):
            check_cross_entropy("torch", torch.float64, PARTS["uneven"], COMBINATIONS[:1])
    finally:
        setattr(owner, attribute, right)


def _without_a_common_maximum(stats, group, mass):
    vocab_parallel._sum(stats[1:], group)
    return stats


def checks():
    """name -> check without arguments."""
    some = random.Random(0).sample(COMBINATIONS, 40)
    found = {}
    for name, parts in PARTS.items():
        many = some if name == "uneven" else some[:3]
        found[f"torch cross entropy {name}"] = lambda p=parts, m=many: check_cross_entropy("torch", torch.float64, p, m)
        found[f"torch logprobs {name}"] = lambda p=parts: check_logprobs("torch", torch.float64, p)
    uneven = PARTS["uneven"]
    found["reference cross entropy"] = lambda: check_cross_entropy("reference", torch.float64, uneven, some[:10])
    found["reference logprobs"] = lambda: check_logprobs("reference", torch.float64, uneven)
    found["triton cross entropy"] = lambda: check_cross_entropy("triton", torch.float32, uneven, _covering())
    found["triton logprobs"] = lambda: check_logprobs("triton", torch.float32, uneven)
    for backend in ("torch", "triton"):
        found[f"{backend} no target here"] = lambda b=backend: check_no_target_here(b)
        found[f"{backend} a part ruled out"] = lambda b=backend: check_a_part_ruled_out(b)
        found[f"{backend} shared offset"] = lambda b=backend: check_a_shared_offset(b)
        found[f"{backend} bf16"] = lambda b=backend: check_16_bits(b, torch.bfloat16)
        found[f"{backend} fp16"] = lambda b=backend: check_16_bits(b, torch.float16)
        found[f"{backend} autocast and errors"] = lambda b=backend: check_autocast_and_errors(b)
    found["planted sum"] = lambda: check_planted_bug_is_seen("whole_dinput", lambda part, gradients: gradients)
    found["planted maximum"] = lambda: check_planted_bug_is_seen("_finish", _without_a_common_maximum)
    return found


def main(rank: int, folder: Path) -> None:
    """Runs every check on both ranks in the same order and writes what went wrong."""
    from fastlm._interpreter import repair_interpreter
    from tests.quick_interpreter import quicken_interpreter

    repair_interpreter()
    quicken_interpreter()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {}
    for name, check in checks().items():
        torch.manual_seed(0)
        try:
            check()
            results[name] = None
        except Exception:  # reported by the test of this name
            results[name] = traceback.format_exc()[-3000:]
            print(name, results[name], flush=True)  # one rank may now be ahead of the other, and end both
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name of a check -> None or its traceback, of both processes; one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("two")
    run_both(__file__, folder)
    return results_of(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, on the CPU")
@pytest.mark.parametrize("name", checks())
def test_two_processes(results, name):
    assert [one[name] for one in results] == [None, None]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
