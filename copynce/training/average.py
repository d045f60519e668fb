"""The running mean of a model's weights over the steps of a training (exponential moving average)."""

from __future__ import annotations

from typing import Any

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from copynce.models import AnyModel


class WeightMean:
    """``mean <- decay * mean + (1 - decay) * model`` after each step; the first update takes the model as it is.

    ``model`` stays the one that is trained. What it has beside its parameters (BatchNorm's statistics) is copied, not
    averaged.
    """

    def __init__(self, model: AnyModel, decay: float) -> None:
        self._trained = model
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def model(self) -> AnyModel:
        """The model of the mean weights."""
        model: Any = self._averaged.module
        return model

    def update(self) -> None:
        """The trained model has made a step."""
        self._averaged.update_parameters(self._trained)

    def state(self) -> dict[str, Any]:
        """What is needed beside :attr:`model` to go on: the trained weights, and the number of updates."""
        return {"updates": int(self._averaged.n_averaged), "trained": self._trained.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave, on the model that was :attr:`model` then."""
        self._averaged.n_averaged.fill_(state["updates"])
        self._trained.load_state_dict(state["trained"])
