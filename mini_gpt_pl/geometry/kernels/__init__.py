"""The Triton kernels, each None where there is no Triton, as in builds of torch for CPUs."""

try:
    from mini_gpt_pl.geometry.kernels import rows as row_kernels
    from mini_gpt_pl.geometry.kernels import steps as step_kernels
except ImportError:
    row_kernels = step_kernels = None  # type: ignore[assignment]

__all__ = ["row_kernels", "step_kernels"]
