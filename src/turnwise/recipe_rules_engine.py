"""What may not stand together in the settings of the engine: `turnwise.recipe_rules` asks."""

from __future__ import annotations

from collections.abc import Iterator

from turnwise.config import Recipe

_EMBEDDED = {
    "kv_tokens": "--gpu-memory-utilization",
    "max_sequences": "--max-num-seqs",
    "prefill_tokens": "--max-num-batched-tokens",
    "dtype": "--dtype",
    "device": "CUDA_VISIBLE_DEVICES",
}
"""Keys of the embedded engine, and what of a vLLM server takes their place."""
_VLLM = ("urls", "start_seconds", "request_seconds", "weights", "weights_dir", "nccl_port")


def idle_engine_keys(recipe: Recipe) -> dict[str, str]:
    """The keys that do nothing with the chosen engine, each with the reason."""
    engine = recipe.engine
    if engine.kind == "embedded":
        return {f"engine.{key}": "with engine.kind=embedded" for key in _VLLM}
    idle = {
        f"engine.{key}": f"with engine.kind=vllm, whose server is started with {flag}"
        for key, flag in _EMBEDDED.items()
    }
    if engine.weights == "nccl":
        idle["engine.weights_dir"] = "with engine.weights=nccl"
    else:
        idle["engine.nccl_port"] = f"with engine.weights={engine.weights or 'unset'}; nccl reads it"
    return idle


def engine_problems(recipe: Recipe) -> Iterator[str]:
    """What contradicts itself."""
    yield from _contexts(recipe)
    if recipe.engine.kind == "vllm":
        yield from _vllm(recipe)


def _contexts(recipe: Recipe) -> Iterator[str]:
    most = recipe.engine.max_context
    if most is None:
        return
    for name, environment in recipe.environments.items():
        asked = environment.limits.max_context
        if asked is not None and asked > most:
            yield (
                f"environments.{name}.limits.max_context: {asked} is more than engine.max_context, {most}; "
                "lower the one or raise the other"
            )
    collect = recipe.collect if recipe.collect and recipe.collect.policy == "engine" else None
    for key, section in (("collect", collect), ("rl", recipe.rl), ("evaluate", recipe.evaluate)):
        if section is not None and section.sampling.max_tokens >= most:
            yield (
                f"{key}.sampling.max_tokens: {section.sampling.max_tokens} leave no room for a prompt in "
                f"engine.max_context, {most}; lower the one or raise the other"
            )


def _vllm(recipe: Recipe) -> Iterator[str]:
    engine = recipe.engine
    if not engine.urls:
        yield (
            "engine.urls: engine.kind=vllm needs the URL of a server at least; `turnwise vllm up MODEL` "
            "starts one and prints it"
        )
    for url in engine.urls:
        if not url.startswith(("http://", "https://")):
            yield f"engine.urls: a URL such as http://127.0.0.1:8000 is needed, found {url!r}"
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        yield f"engine.urls: a server is named twice in {', '.join(engine.urls)}; name each once"
    if engine.weights == "adapter" and recipe.model.lora is None:
        yield "engine.weights: adapter sends a LoRA adapter, and model.lora is not set; set it, or use file"
    if engine.weights == "adapter" and recipe.model.quantization is not None:
        yield (
            "engine.weights: adapter leaves a server's own weights as they are, and model.quantization has "
            "others under its adapters; use file"
        )
    sampling = recipe.rl.sampling if recipe.rl else None
    for key in ("top_p", "top_k", "min_p"):
        if sampling is not None and getattr(sampling, key) != type(sampling).model_fields[key].default:
            yield (
                f"rl.sampling.{key}: a vLLM server does not tell the mass that a cut keeps, found "
                f"{getattr(sampling, key)}; remove it, or use engine.kind=embedded"
            )
