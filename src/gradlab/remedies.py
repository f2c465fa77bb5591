"""What to do about each thing that `gradlab.diagnosis` finds, and the chapter that shows it."""

from __future__ import annotations

from typing import NamedTuple


class Remedy(NamedTuple):
    """What to do, in the imperative, and the title of the chapter that shows it."""

    text: str
    chapter: str


REMEDIES = {
    "bad batch": Remedy(
        "Find the sample and fix what produced it; assert np.isfinite(batch).all() where batches "
        "are made. Standardise features. Clipping would only hide it.",
        "Why does it explode?",
    ),
    "bad index": Remedy(
        "Compare the labels or token numbers with the size of the last layer or of the embedding "
        "table; count from 0, and name the padding value as ignore_index or as a mask.",
        "Why did it blow up?",
    ),
    "bad shape": Remedy(
        "The step does not run at all: mend this before anything else.",
        "Why did it blow up?",
    ),
    "bad parameter": Remedy(
        "Earlier steps wrote this, and whatever else is odd here may follow from it. Go back to a "
        "checkpoint from before, its optimiser state included, or to the freshly built model, and "
        "diagnose that. Weights that grew over some steps point to a learning rate that is too "
        "high; weights that are NaN from one step to the next, to a single operation.",
        "What does a huge gradient do?",
    ),
    "bad buffer": Remedy(
        "A bad batch went into the running statistics, which never forget it. Restore them from a "
        "checkpoint or reset them, and find that batch.",
        "What does a huge gradient do?",
    ),
    "pole": Remedy(
        "Keep the input away from the singular point, inside the operation: sqrt(x + eps), "
        "x / (norm + eps), log(max(x, eps)), or a form made for it (log_softmax, logsumexp, "
        "cross-entropy from logits). Clipping the gradient cannot help: NaN times anything is NaN.",
        "Why did it blow up?",
    ),
    "masked branch": Remedy(
        "An epsilon inside the operation, sqrt(x + eps), mends both. If there is a `where`, its "
        "discarded branch still has a gradient: guard the input too, "
        "where(ok, f(where(ok, x, 1)), other).",
        "Why did it blow up?",
    ),
    "empty statistic": Remedy(
        "The statistic has nothing, or a single value, to be taken over. Drop the batch, or divide "
        "by max(count, 1); leave out a last batch of one for batch normalisation.",
        "Why did it blow up?",
    ),
    "near pole": Remedy(
        "The input is next to a singular point of this operation. Add an epsilon of the size of "
        "your data's noise inside it, or stop the gradient there.",
        "Why did it blow up?",
    ),
    "depth": Remedy(
        "Lower the gain of the initial weights to the critical one (He for ReLU: variance "
        "2/fan-in), or normalise each layer, or scale the residual branches. A smaller learning "
        "rate or another optimiser leaves the growth as it is.",
        "Where should training start?",
    ),
    "time": Remedy(
        "The same weights act at every time step: initialise them orthogonally or with a smaller "
        "spectral radius, use a gated cell (LSTM, GRU), clip the gradient's norm, or truncate "
        "backpropagation.",
        "What cures a recurrent network?",
    ),
    "one layer": Remedy(
        "One layer alone multiplies the signal. Look at its weights: their scale is not that of "
        "the others.",
        "Where should training start?",
    ),
    "overflow": Remedy(
        "The numbers are too large for the format, not wrong: keep this operation in float32 or "
        "bfloat16, or scale before you multiply and not after. Dynamic loss scaling helps when it "
        "is the gradient that does not fit.",
        "What can a number format hold?",
    ),
    "too large": Remedy(
        "The result is larger than float32's largest number, 3.4e38, though float64 could hold it. "
        "A wider format would only move the limit: find what made the inputs named here that "
        "large, and scale it before you multiply, not after. If the optimiser has stepped already, "
        "ask the freshly built model or an earlier checkpoint as well.",
        "What can a number format hold?",
    ),
    "norm": Remedy(
        "Every gradient is a number, only their norm is not, so clipping by norm sets them to 0 or "
        "NaN without a word. Clip with the probe's clip_, which scales before it squares, and ask "
        "why they are that large.",
        "Clipping in practice: which clip, and how low?",
    ),
    "underflow": Remedy(
        "Gradients are too small for the format. Scale the loss up before the backward pass and "
        "the gradients down after it (GradScaler, LossScaleOptimizer), or use bfloat16.",
        "How do you train in float16?",
    ),
    "cancellation": Remedy(
        "Digits are lost: look for differences of large, nearly equal numbers, and rewrite them "
        "(expm1, log1p, a mean subtracted first), or keep that part in float64.",
        "Why did it blow up?",
    ),
    "step size": Remedy(
        "Take a learning rate below the limit that is named here, or a tenth where none is, then "
        "look for the highest that still learns. A warm-up, or clipping the norm, also bounds the "
        "step. A limit far below all rates in use points to inputs or a loss that are too large: "
        "scale them. Half the initial gain would not help.",
        "How long may a step be?",
    ),
    "summed loss": Remedy(
        "The loss adds up over the batch, so the step grows with the batch. Average it, or divide "
        "the learning rate by the batch size.",
        "Does a larger batch help?",
    ),
    "vanishing": Remedy(
        "Use the critical gain for the activation, a non-saturating activation, residual "
        "connections or normalisation. Clipping and a larger learning rate do not reach the first "
        "layers.",
        "Where should training start?",
    ),
    "detached": Remedy(
        "Look for detach(), stop_gradient, no_grad, .item() or NumPy between the parameters and "
        "the loss, and for parameters that are all frozen.",
        "Why did it blow up?",
    ),
    "dead": Remedy(
        "No gradient passes here at all: look for activations that are all off (dead ReLU), "
        "weights that are all 0, a saturated loss on probabilities (use logits), or a detach().",
        "Which starts cannot work?",
    ),
}
