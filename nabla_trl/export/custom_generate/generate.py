"""The reasoner of nabla_trl as a custom generation method: `model.generate(custom_generate=THIS_REPOSITORY, ...)`.

    model.generate(
        **tokenizer(prompts, return_tensors="pt", padding=True),
        custom_generate=THIS_REPOSITORY, trust_remote_code=True,
        tokenizer=tokenizer, reward=REWARD, max_new_tokens=512,
    )

The work is done by the installed package; `nabla_trl.export.custom_generation.generate` tells of the arguments.
"""

try:
    from nabla_trl.export.custom_generation import generate  # noqa: F401  (transformers looks it up here)
except ImportError as error:
    raise ImportError(
        f"this custom generation method runs in the package nabla-trl, which is missing or too old here: {error}"
    ) from error
