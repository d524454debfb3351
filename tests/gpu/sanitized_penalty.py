"""Every kernel and path once, on small tensors; run under compute-sanitizer by test_gradient_penalty_cuda.py."""

import torch

from ganexport.kernels.gradient_penalty import gradient_penalty, interpolate, make_rng_state

# elements a sample: a team of lanes, a block, a cluster, a split reduction; aligned and not
SIZES = (1, 7, 784, 3072, 12_288, 65_536, 49_151, 600_000)


def main() -> None:
    """Forward, backward, backward again, interpolation."""
    for dtype in (torch.float32, torch.float16):
        for elements in SIZES:
            grad = torch.full((3, elements), 0.01, dtype=dtype, device="cuda").requires_grad_()
            penalty = gradient_penalty(grad, weight=10.0, impl="cuda")
            torch.autograd.grad(penalty, grad, retain_graph=True)
            (2 * penalty).backward()
            interpolate(grad.detach(), grad.detach(), make_rng_state(0, "cuda"), impl="cuda")
    torch.cuda.synchronize()
    print("done")  # noqa: T201


if __name__ == "__main__":
    main()
