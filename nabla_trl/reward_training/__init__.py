"""Training of scalar, head and implicit rewards on the policy's own responses, with answer labels or step labels.

Hands out: `RewardOptions`, `train_reward`, `train_implicit_reward`, `train_state_head`,
`LabeledResponse`, `sample_responses`, `label_responses`, `TokenLabeler`, `has_step_labels`, `TokenRewardTrainer`,
`write_reward_readme`.
May import: utils, grading, tasks, states, models, gradient, rewards, traces, baselines, training.
"""
