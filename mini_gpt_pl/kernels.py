"""The Triton kernels, each None where there is no Triton, as in builds of torch for CPUs."""

try:
    from mini_gpt_pl import row_kernels, step_kernels
    from mini_gpt_pl.scoring_kernel import score_in_place
except ImportError:
    row_kernels = step_kernels = score_in_place = None  # type: ignore[assignment]

__all__ = ["row_kernels", "score_in_place", "step_kernels"]
