"""fp16 on CPUs, which DeepSpeed and megalm refuse for its speed there; torch computes it."""

from __future__ import annotations


def allow_fp16() -> None:
    """Lift both refusals in this process, a test's own."""
    from deepspeed.accelerator import get_accelerator

    from megalm.config import checks_layout

    type(get_accelerator()).is_fp16_supported = lambda self: True
    rules = checks_layout._device
    checks_layout._device = lambda config, device_type, world_size: (
        failure for failure in rules(config, device_type, world_size) if "does not train fp16" not in failure.rule
    )
