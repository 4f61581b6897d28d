"""The search of nabla_trl as a custom generation method of transformers.

    model.generate(
        **tokenizer(prompts, return_tensors="pt", padding=True),
        custom_generate=THIS_REPOSITORY, trust_remote_code=True,
        tokenizer=tokenizer, reward=REWARD, max_new_tokens=512,
    )

The installed package does the work. `nabla_trl.exporting.custom_generation.generate` describes the arguments.
"""

try:
    from nabla_trl.exporting.custom_generation import generate  # noqa: F401  (transformers looks this name up)
except ImportError as error:
    raise ImportError(
        f"this custom generation method needs the package nabla-trl, which is missing or too old: {error}"
    ) from error
