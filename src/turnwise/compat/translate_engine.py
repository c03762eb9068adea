"""From TRL's arguments to how tokens are drawn, and by what: ``rl.sampling`` and ``engine``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turnwise.compat.fields import is_set
from turnwise.errors import RecipeError

if TYPE_CHECKING:
    from turnwise.compat.arguments import GRPOConfig, RLOOConfig

DRAWN = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "max_tokens": "max_tokens", "max_new_tokens": "max_tokens",
}  # fmt: skip
"""Keys of ``generation_kwargs``, and the settings that they take the place of."""
SERVED = (
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
)  # fmt: skip
"""Of a vLLM server."""
ROOM = 2048
"""Tokens for a prompt, where the engine's usual context would leave less beside ``max_completion_length``."""
USUAL_CONTEXT = 4096
"""The embedded engine's, of a model that allows more."""
MOST_SEQUENCES = 64
"""That decode at once."""


def sampling_settings(args: GRPOConfig | RLOOConfig) -> tuple[dict[str, Any], bool]:
    """How tokens are drawn, and whether the distribution is cut.

    Raises:
        RecipeError: ``generation_kwargs`` has a key that is not known.
    """
    most = args.max_completion_length
    if most is None:
        if getattr(args, "loss_type", None) == "dr_grpo":
            raise RecipeError("loss_type='dr_grpo' divides by max_completion_length: set it")
        most = (args.vllm_max_model_length or USUAL_CONTEXT) - 1
    settings: dict[str, Any] = {
        "max_tokens": most,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p or 0.0,
    }
    given = args.generation_kwargs or {}
    assert isinstance(given, dict), "transformers has read it from JSON"
    for key, value in given.items():
        if key not in DRAWN:
            raise RecipeError(
                f"generation_kwargs takes {', '.join(DRAWN)}; found {key}, which no engine here has"
            )
        settings[DRAWN[key]] = value
    if settings["top_k"] == -1:  # vLLM's way to say that it keeps all.
        settings["top_k"] = 0
    return settings, settings["top_p"] < 1 or settings["top_k"] > 0 or settings["min_p"] > 0


def engine_settings(
    args: GRPOConfig | RLOOConfig, notes: list[str], *, episodes: int, context: int | None
) -> dict[str, Any]:
    """What plays.

    Args:
        args: The trainer's arguments.
        notes: Takes what does nothing.
        episodes: Played at once.
        context: The longest context that the model itself allows; None where that is not known.

    Raises:
        RecipeError: ``vllm_mode`` is not known.
    """
    if args.vllm_mode not in ("colocate", "server"):
        raise RecipeError(f"vllm_mode is 'colocate' or 'server'; found {args.vllm_mode!r}")
    served = args.use_vllm and args.vllm_mode == "server"
    idle = [] if served else [name for name in SERVED if is_set(args, name)]
    if not args.use_vllm:
        idle += ["vllm_mode"] if is_set(args, "vllm_mode") else []
        notes += [f"{name} does nothing with use_vllm=False" for name in idle]
    elif not served:
        notes.append(
            "vllm_mode='colocate': the embedded engine plays, in this process and with continuous batching, "
            "and not vLLM; it shares the GPU with the learner"
        )
        notes += [f"{name} does nothing with vllm_mode='colocate'" for name in idle]
    if served:
        return _server(args)
    settings: dict[str, Any] = {"max_sequences": min(MOST_SEQUENCES, episodes)}
    if args.use_cpu:
        settings["device"] = "cpu"
    needed = (args.max_completion_length or 0) + ROOM
    if args.vllm_max_model_length is not None:
        settings["max_context"] = args.vllm_max_model_length
    elif needed > USUAL_CONTEXT:
        settings["max_context"] = needed if context is None else min(needed, context)
    return settings


def _server(args: GRPOConfig | RLOOConfig) -> dict[str, Any]:
    host = "127.0.0.1" if args.vllm_server_host == "0.0.0.0" else args.vllm_server_host
    settings: dict[str, Any] = {
        "kind": "vllm",
        "urls": [args.vllm_server_base_url or f"http://{host}:{args.vllm_server_port}"],
        "start_seconds": float(args.vllm_server_timeout),
        "max_context": args.vllm_max_model_length,
    }
    if is_set(args, "vllm_group_port"):
        settings |= {"weights": "nccl", "nccl_port": args.vllm_group_port}
    return settings
