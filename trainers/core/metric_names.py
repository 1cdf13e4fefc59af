"""Every name that a row of metrics.jsonl, and W&B, may have: its unit, its meaning, who writes it.

docs/metrics.md is made of this table. tests/docs/test_metric_names.py compares it with golden
curves. Lists and gaps (null) are in metrics.jsonl only."""

from __future__ import annotations

from dataclasses import dataclass

# Which rows have a name. An evaluation row is one with `eval/…` names, and a step row is any other.
EVERY_ROW = "every row"
EVERY_STEP = "every step"
SAMPLING = "steps of recipes that sample completions"
DISTILLING = "steps of recipes with a teacher or self-distillation"
TAUGHT = "steps of recipes with a teacher"
SAME_TOKENS = f"{TAUGHT}, but for teacher.tokenizer=own"
ONE_TEACHER = f"{SAME_TOKENS} and several that are averaged"
OWN_TOKENS = "steps of recipes with teacher.tokenizer=own"
NAMED_TEACHERS = "steps of recipes with teachers"
NAMED_REWARDS = f"{NAMED_TEACHERS} and objective=policy_gradient"
TOKEN_REWARDS = "steps of recipes with a reward or an advantage per token"
ALL_REWARDS = f"{TOKEN_REWARDS}, and of on-policy SFT"
TEACHER_REWARDS = "steps of recipes with a teacher, objective=policy_gradient and no task reward"
SELECTING = "steps of recipes with reward.select"
MIXED = "steps of recipes with a teacher and reward.task_weight above 0"
GROUPS = "steps of recipes with group advantages: GRPO, AdaSR, reward.task_weight above 0"
MINIBATCHES = "steps of GRPO and AdaSR with train.minibatches above 1"
REFERENCE = "steps of GRPO and AdaSR with grpo.kl_beta above 0"
CACHED = "steps of recipes with teacher.cache"
FILTERING = "steps of on-policy SFT"
SLOW_STEPS = "steps in which there were some"
FUNCTIONS = "steps of recipes with reward.functions"
ADASR = "steps of AdaSR"
PROACTIVE = "steps of ProactiveLLM"
EVERY_EVALUATION = "every evaluation"
STREAMING_EVALUATION = "evaluations of streaming models"
SIMULTANEOUS_EVALUATION = "evaluations of simultaneous models"
SLOW_EVALUATIONS = "evaluations in which there were some"


@dataclass(frozen=True)
class Metric:
    """What a name of a row stands for.

    Attributes:
        unit: of the value; `share` is a number in [0, 1].
        meaning: one sentence.
        rows: which rows have it, one of the texts above.
    """

    unit: str
    meaning: str
    rows: str


METRICS: dict[str, Metric] = {
    "step": Metric(
        "optimizer steps",
        "The step that has ended; an evaluation row has the step before it, 0 at the start.",
        EVERY_ROW,
    ),
    # The update
    "train/loss": Metric(
        "the method's",
        "The loss over all ranks, mean over the step's updates; null where all were skipped.",
        EVERY_STEP,
    ),
    "train/grad_norm": Metric(
        "L2 norm",
        "The gradient's norm over all parameters before clipping, mean over the step's updates.",
        EVERY_STEP,
    ),
    "train/lr": Metric("1", "The learning rate of the step's updates.", EVERY_STEP),
    "train/skipped": Metric(
        "updates", "Updates of the step that no trajectory was kept for.", EVERY_STEP
    ),
    "train/nonfinite": Metric(
        "updates",
        "Updates of the step that were skipped, as their loss or gradient was not finite.",
        EVERY_STEP,
    ),
    "train/tokens": Metric(
        "tokens",
        "Prompt and completion tokens of the step's trajectories, over all ranks.",
        EVERY_STEP,
    ),
    # Rewards
    "reward/mean": Metric(
        "the reward's",
        "Mean reward: over unmasked tokens, or over completions where the method rewards these.",
        ALL_REWARDS,
    ),
    "reward/std": Metric(
        "the reward's",
        "Standard deviation of what reward/mean is the mean of.",
        ALL_REWARDS,
    ),
    "reward/min": Metric(
        "the reward's",
        "Smallest of what reward/mean is the mean of.",
        ALL_REWARDS,
    ),
    "reward/max": Metric(
        "the reward's",
        "Largest of what reward/mean is the mean of.",
        ALL_REWARDS,
    ),
    "reward/by_position": Metric(
        "the reward's",
        "List: mean reward, or advantage, of the unmasked tokens in each of 32 bins of positions.",
        TOKEN_REWARDS,
    ),
    "reward/by_position_bins": Metric(
        "tokens", "List: the first position of each bin of reward/by_position.", TOKEN_REWARDS
    ),
    "reward/accuracy": Metric(
        "share",
        "The verifier's mean score of the completions; absent where no prompt has an answer.",
        SAMPLING,
    ),
    "reward/timeouts": Metric(
        "completions",
        "Completions that count as wrong, or as less right, as their check did not end in time.",
        SLOW_STEPS,
    ),
    "reward/<function>/mean": Metric(
        "the function's",
        "Mean score of a function of reward.functions over the completions, before its weight.",
        FUNCTIONS,
    ),
    "reward/<function>/failed": Metric(
        "completions",
        "Completions that have the function's default, as it failed or was late.",
        FUNCTIONS,
    ),
    "reward/equal_groups_frac": Metric(
        "share",
        "Prompts whose completions all have the same reward, and so no advantage.",
        GROUPS,
    ),
    "reward/dead_frac": Metric(
        "share",
        "Unmasked tokens whose token reward is exactly 0, as where both probabilities underflow.",
        TEACHER_REWARDS,
    ),
    "reward/selected_frac": Metric(
        "share", "Tokens that learn, of those that could be selected.", SELECTING
    ),
    "reward/teacher_mean": Metric(
        "the reward's", "Mean weighted token reward, without the verifier's part.", MIXED
    ),
    "reward/task_abs_mean": Metric(
        "the reward's", "Mean size of the verifier's weighted advantage, over tokens.", MIXED
    ),
    "reward/format": Metric(
        "share", "Mean product of the format scores of the streaming and the deep part.", ADASR
    ),
    "reward/thinking": Metric(
        "0 to 2",
        "Mean thinking reward of the slots plus that of the deep part; 0 for wrong answers.",
        ADASR,
    ),
    # Completions
    "rollout/length_mean": Metric(
        "tokens",
        "Mean number of sampled tokens of a completion, with the one that ends it.",
        SAMPLING,
    ),
    "rollout/truncated_frac": Metric(
        "share", "Completions that were cut at the limit on new tokens.", SAMPLING
    ),
    "rollout/efficiency": Metric(
        "% per token",
        "100 times reward/accuracy over rollout/length_mean; absent where reward/accuracy is.",
        SAMPLING,
    ),
    "rollout/entropy": Metric(
        "nats", "Mean entropy of the trained policy's distribution at unmasked tokens.", EVERY_STEP
    ),
    "rollout/kept_frac": Metric("share", "Completions that are kept to learn from.", FILTERING),
    "rollout/prompts_with_none": Metric(
        "prompts", "Prompts of the step without a kept completion.", FILTERING
    ),
    "rollout/streaming_length_mean": Metric(
        "tokens", "Mean number of tokens of a completion written while reading.", ADASR
    ),
    "rollout/deep_length_mean": Metric(
        "tokens", "Mean number of tokens of a completion written after reading.", ADASR
    ),
    "rollout/skip_frac": Metric("share", "Sentences whose thought is a lone <skip>.", ADASR),
    # Trainer against sampler: the log-probs of the same tokens under the same weights
    "mismatch/logp_abs_mean": Metric(
        "nats",
        "Mean absolute difference of the trainer's and the sampler's log-probs of sampled tokens.",
        SAMPLING,
    ),
    "mismatch/kl": Metric(
        "nats",
        "Estimate k3 of KL(sampler || trainer): mean of r - 1 - log r, r = trainer / sampler.",
        SAMPLING,
    ),
    "mismatch/ess": Metric(
        "share",
        "Effective sample size of the ratios r, as a share of the tokens: (sum r)^2 / (n sum r^2).",
        SAMPLING,
    ),
    # The teacher, the reference and the old policy
    "teacher/kl": Metric(
        "nats",
        "Divergence from the teacher: the objective's own, or the mean of log q - log p.",
        DISTILLING,
    ),
    "teacher/tv": Metric(
        "share",
        "Total variation of student and teacher, its unbiased estimate: mean of max(0, 1 - p/q).",
        SAME_TOKENS,
    ),
    "teacher/agreement": Metric(
        "share", "Sampled tokens that are the teacher's most likely one.", ONE_TEACHER
    ),
    "teacher/aligned_frac": Metric(
        "share",
        "Sampled tokens in spans that have the same bytes for the teacher, and were scored by it.",
        OWN_TOKENS,
    ),
    "teacher/span_tokens": Metric(
        "tokens", "Mean number of the student's tokens in such a span.", OWN_TOKENS
    ),
    "teacher/tail": Metric(
        "share",
        "The teacher's probability of all tokens that are not in the cache, mean over tokens.",
        CACHED,
    ),
    # Each of several. <name> is its name in the config
    "teacher/<name>/share": Metric(
        "share", "Unmasked tokens of the step that the teacher scores.", NAMED_TEACHERS
    ),
    "teacher/<name>/kl": Metric(
        "nats", "Mean of log q - log p over the tokens that the teacher scores.", NAMED_TEACHERS
    ),
    "teacher/<name>/reward_mean": Metric(
        "the reward's",
        "Mean token reward for the teacher's own p, without weights and standardisation.",
        NAMED_REWARDS,
    ),
    "reference/kl": Metric(
        "nats", "Estimate k3 of the KL from the reference, mean over unmasked tokens.", REFERENCE
    ),
    "policy/clip_frac": Metric(
        "share", "Unmasked tokens whose gradient the clipped ratio cuts off.", MINIBATCHES
    ),
    "nll/batch": Metric(
        "nats", "Mean negative log-prob of target tokens with the whole source in view.", PROACTIVE
    ),
    "nll/stream": Metric(
        "nats",
        "Mean negative log-prob of target tokens with a part of the source in view.",
        PROACTIVE,
    ),
    # Time and memory
    "time/rollout": Metric("seconds", "Drawing and scoring the step's completions.", EVERY_STEP),
    "time/annotate": Metric(
        "seconds", "Sharing out the trajectories and annotating them, teacher included.", EVERY_STEP
    ),
    "time/update": Metric("seconds", "Forward, backward and optimizer.", EVERY_STEP),
    "time/sync": Metric("seconds", "Bringing the new weights to the sampler.", EVERY_STEP),
    "time/step": Metric("seconds", "The whole step.", EVERY_STEP),
    "time/eval": Metric("seconds", "The whole evaluation.", EVERY_EVALUATION),
    "perf/tokens_per_second": Metric("tokens/s", "train/tokens over time/step.", EVERY_STEP),
    "perf/peak_memory_gib": Metric(
        "GiB",
        "Largest memory use so far of any rank: of its GPU, or of the process on a CPU.",
        EVERY_STEP,
    ),
    # Evaluations. <data> is the data's name, k is eval.k
    "eval/<data>/avg@k": Metric(
        "share", "Correct completions: Avg@k, mean over prompts and samples.", EVERY_EVALUATION
    ),
    "eval/<data>/pass@k": Metric(
        "share",
        "Chance that one of k completions of a prompt is correct, mean over prompts.",
        EVERY_EVALUATION,
    ),
    "eval/<data>/length_mean": Metric(
        "tokens", "Mean number of sampled tokens of a completion.", EVERY_EVALUATION
    ),
    "eval/<data>/truncated_frac": Metric(
        "share", "Completions that were cut at the limit on new tokens.", EVERY_EVALUATION
    ),
    "eval/<data>/efficiency": Metric(
        "% per token", "100 times avg@k over length_mean.", EVERY_EVALUATION
    ),
    "eval/<data>/timeouts": Metric(
        "completions", "As reward/timeouts, of the evaluation's completions.", SLOW_EVALUATIONS
    ),
    "eval/<data>/streaming_length_mean": Metric(
        "tokens",
        "Mean number of tokens of a completion written while reading.",
        STREAMING_EVALUATION,
    ),
    "eval/<data>/deep_length_mean": Metric(
        "tokens",
        "Mean number of tokens of a completion written after reading.",
        STREAMING_EVALUATION,
    ),
    "eval/<data>/skip_frac": Metric(
        "share", "Sentences whose thought is a lone <skip>.", STREAMING_EVALUATION
    ),
    "eval/<data>/wait_tokens": Metric(
        "tokens",
        "Mean number of source tokens read when the first thought that is no <skip> starts.",
        STREAMING_EVALUATION,
    ),
    "eval/<data>/latency_s": Metric(
        "seconds",
        "Simulated mean time from the last word read to the first token of the answer.",
        STREAMING_EVALUATION,
    ),
    "eval/<data>/seconds_per_token": Metric(
        "seconds", "The time to write a token that latency_s assumes.", STREAMING_EVALUATION
    ),
    "eval/<data>/bleu": Metric(
        "0 to 100",
        "BLEU of the corpus against the references, with eval.bleu_tokenizer.",
        SIMULTANEOUS_EVALUATION,
    ),
    "eval/<data>/chrf": Metric(
        "0 to 100", "chrF of the corpus against the references.", SIMULTANEOUS_EVALUATION
    ),
    "eval/<data>/f1": Metric(
        "share",
        "Mean F1 of the words against the nearest reference; of text without spaces, of its "
        "characters.",
        SIMULTANEOUS_EVALUATION,
    ),
    "eval/<data>/exact": Metric(
        "share",
        "Texts that are a reference, without case, punctuation and articles.",
        SIMULTANEOUS_EVALUATION,
    ),
    "eval/<data>/rco": Metric(
        "share",
        "Read coverage: the part of the source read at a target word, mean over words.",
        SIMULTANEOUS_EVALUATION,
    ),
    "eval/<data>/ail": Metric(
        "source units",
        "Ideal lag: how far words are behind an even pace, mean over all words written.",
        SIMULTANEOUS_EVALUATION,
    ),
    "eval/<data>/al": Metric(
        "source units",
        "Average lagging by the reference's length, up to the first word with all read.",
        SIMULTANEOUS_EVALUATION,
    ),
    "eval/<data>/laal": Metric(
        "source units",
        "Average lagging by the longer of the reference and the text written.",
        SIMULTANEOUS_EVALUATION,
    ),
    "eval/<data>/head_setting": Metric(
        "the decision head's", "Its threshold, k or ratio.", SIMULTANEOUS_EVALUATION
    ),
}


def entry(name: str) -> str:
    """The table's name for one in a row, as `eval/<data>/avg@k` for `eval/stories/avg@4`, and
    `teacher/<name>/kl` for `teacher/math/kl`."""
    group, _, rest = name.partition("/")
    if group == "reward" and "/" in rest:
        return f"reward/<function>/{rest.rpartition('/')[2]}"
    if group == "teacher" and "/" in rest:
        return f"teacher/<name>/{rest.rpartition('/')[2]}"
    if group != "eval":
        return name
    score = rest.rpartition("/")[2]
    head, at, _ = score.partition("@")
    return f"eval/<data>/{head}@k" if at else f"eval/<data>/{score}"
