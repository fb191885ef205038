"""What width maps cost, and the best one that a budget allows.

Costs are counted (parameters, FLOPs) or measured (seconds); in either case a layer's cost depends on its own width, and
the layers' costs add up. So do, in the proxy, the layers' loss increases. Under both assumptions choosing a width per
layer is a multiple-choice knapsack, solved here by dynamic programming over the combinations that no other beats in
both cost and loss (Nemhauser & Ullmann 1969, Management Science 15(9)). No grid of costs is needed: seconds are
compared as they were measured, and a combination is kept only if its own sum is within the budget.
`choose_greedily` is the usual heuristic, there as a check: it never finds a lower proxy loss. `refine` goes on from
there with real losses, since a layer's increase depends on what the others are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from braniac.model.config import ModelConfig
from braniac.model.errors import ConfigError
from braniac.model.gpt import GPT
from braniac.model.mixnmatch import Sensitivities, Windows, checked_candidates, evaluate_maps
from braniac.model.tiers import heads_at, layer_of, shapes_at

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

PARAMETERS = "parameters"
FLOPS = "FLOPs per token"

# Parameters and FLOPs of real models have a few thousand different sums; only adversarial tables come near this.
MAX_COMBINATIONS = 1 << 16
_EXACT = 1 << 53


@dataclass(frozen=True, kw_only=True, slots=True)
class CostTable:
    """What each width costs in each layer. Raises ConfigError for costs that cannot be added up."""

    unit: str
    """What is counted, as messages and recipes name it: parameters, FLOPs per token, seconds."""

    layers: tuple[Mapping[int, float], ...]
    """Per layer, the cost of everything in it at each candidate width."""

    fixed: float
    """Cost of what all width maps share: embedding, head, final norm."""

    def __post_init__(self) -> None:
        for layer, costs in enumerate(self.layers):
            if not costs:
                raise ConfigError(f"layer {layer} has no {self.unit} for any width: give at least one.")
        for cost in (self.fixed, *(cost for costs in self.layers for cost in costs.values())):
            if not 0 <= cost < math.inf:  # NaN fails the comparison too
                raise ConfigError(f"a cost of {cost} {self.unit} is impossible: it must be a finite number from 0 on.")
        if self.fixed + sum(max(costs.values()) for costs in self.layers) > _EXACT:
            raise ConfigError(f"the {self.unit} add up to more than 2^53: count in a larger unit.")

    def of(self, widths: Sequence[int]) -> float:
        """Cost of a whole width map; an exact whole number if the table holds only such.

        Raises ConfigError for a width that is not in the table.
        """
        total = self.fixed
        for layer, (costs, width) in enumerate(zip(self.layers, widths, strict=True)):
            if width not in costs:
                raise ConfigError(
                    f"layer {layer} has no {self.unit} for width {width}: choose from {', '.join(map(str, costs))}."
                )
            total += costs[width]
        return total

    def check_budget(self, budget: float) -> None:
        """Raise ConfigError, naming the smallest possible cost, if no width map is within the budget."""
        smallest = self.of([min(costs, key=costs.__getitem__) for costs in self.layers])
        if not budget >= smallest:  # NaN fails the comparison too
            raise ConfigError(
                f"a budget of {budget:.10g} {self.unit} allows no width map: "
                f"give at least {smallest}, what the cheapest one costs."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A width map that fits a budget."""

    widths: tuple[int, ...]
    """FFN neurons per layer."""

    cost: float
    """In the unit of the table it was chosen by."""

    expected_loss: float
    """By the additive proxy, nats per token."""


def parameter_costs(config: ModelConfig, candidates: Sequence[int] | None = None) -> CostTable:
    """Parameters: `of(widths)` is exactly what an extracted model holds."""
    layer = {width: _elements(_layer_shapes(config, width)) for width in checked_candidates(config, candidates)}
    return CostTable(
        unit=PARAMETERS, layers=(layer,) * config.num_hidden_layers, fixed=_elements(shapes_at(config, []).values())
    )


def flop_costs(config: ModelConfig, attended: int, candidates: Sequence[int] | None = None) -> CostTable:
    """FLOPs of one token's forward pass that attends to `attended` tokens, itself included.

    Two per multiply-add of every matrix in use, of the head, and of attention's two products (queries with keys,
    weights with values). The embedding look-up, norms, rotations and activations are not counted. Raises ConfigError
    unless `attended` is from 1 to the context.
    """
    if not 1 <= attended <= config.context:
        raise ConfigError(f"a token cannot attend to {attended} tokens: choose from 1 to {config.context}.")
    group = config.num_attention_heads // config.kv_heads

    def layer_cost(width: int) -> int:
        matrices = [shape for shape in _layer_shapes(config, width) if len(shape) == 2]
        return 2 * _elements(matrices) + 2 * 2 * heads_at(config, width) * group * config.head_dim * attended

    layer = {width: layer_cost(width) for width in checked_candidates(config, candidates)}
    head = 2 * config.vocab_size * config.hidden_size
    return CostTable(unit=FLOPS, layers=(layer,) * config.num_hidden_layers, fixed=head)


def choose(costs: CostTable, proxy: Sensitivities, budget: float) -> Choice:
    """The width map of the lowest proxy loss within `budget`; of equal ones the cheapest.

    Exact, in the order in which `CostTable.of` and `Sensitivities.expected_loss` add up, unless more than
    MAX_COMBINATIONS are in the running: then they are thinned out evenly, always keeping the cheapest and the best.
    Raises ConfigError if no map is cheap enough, or if table and proxy are about different widths.
    """
    _check_same(costs, proxy)
    costs.check_budget(budget)
    spent_S, loss_S = np.array([float(costs.fixed)]), np.array([proxy.full_loss])
    steps = []
    for layer_costs, increases in zip(costs.layers, proxy.layers, strict=True):
        widths = sorted(layer_costs)
        all_spent = np.add.outer(spent_S, [float(layer_costs[width]) for width in widths]).ravel()
        all_loss = np.add.outer(loss_S, [float(increases[width]) for width in widths]).ravel()
        kept = _undominated(all_spent, all_loss, budget)
        spent_S, loss_S = all_spent[kept], all_loss[kept]
        steps.append((widths, kept))
    chosen, state = [], len(loss_S) - 1  # the last one costs most and loses least
    for widths, kept in reversed(steps):
        state, which = divmod(int(kept[state]), len(widths))
        chosen.append(widths[which])
    return _choice(costs, proxy, chosen[::-1])


def choose_greedily(costs: CostTable, proxy: Sensitivities, budget: float) -> Choice:
    """Start from the cheapest map and keep taking the affordable widening that lowers the loss most per cost.

    Raises ConfigError as `choose` does.
    """
    _check_same(costs, proxy)
    costs.check_budget(budget)
    chosen = _cheapest(costs, proxy)
    while True:
        best = (0.0, 0.0, chosen)
        for layer, (layer_costs, increases) in enumerate(zip(costs.layers, proxy.layers, strict=True)):
            for width in layer_costs:
                gain = increases[chosen[layer]] - increases[width]
                moved = [*chosen[:layer], width, *chosen[layer + 1 :]]
                if gain > 0 and costs.of(moved) <= budget:
                    extra = layer_costs[width] - layer_costs[chosen[layer]]
                    # Measured costs are noisy: a wider layer may be the cheaper one, and is then taken at once.
                    best = max(best, (gain / extra if extra > 0 else math.inf, gain, moved), key=lambda move: move[:2])
        if best[1] == 0:
            return _choice(costs, proxy, chosen)
        chosen = best[2]


def refine(
    model: GPT, costs: CostTable, start: Sequence[int], budget: float, windows: Windows, rounds: int = 8
) -> tuple[tuple[int, ...], float]:
    """Improve a width map by real losses where the proxy's sums mislead: the map and its loss, nats per token.

    Each of at most `rounds` rounds measures every map that gives one layer another width, or two layers each other's,
    and is within the budget; the best one becomes the start of the next round. Raises ConfigError as `choose` does.
    """
    costs.check_budget(budget)
    best = tuple(start)
    seen = dict(zip([best], evaluate_maps(model, [best], windows), strict=True))
    for _ in range(rounds):
        near = [widths for widths in _neighbours(best, costs) if widths not in seen and costs.of(widths) <= budget]
        seen |= zip(near, evaluate_maps(model, near, windows), strict=True)
        before, best = best, min(seen, key=lambda widths: (seen[widths], widths))
        if best == before:
            break
    return best, seen[best]


def _neighbours(widths: tuple[int, ...], costs: CostTable) -> set[tuple[int, ...]]:
    """Every map one change away."""
    changed = {
        (*widths[:layer], width, *widths[layer + 1 :]) for layer, table in enumerate(costs.layers) for width in table
    }
    swapped = set()
    for a, b in itertools.combinations(range(len(widths)), 2):
        other = list(widths)
        other[a], other[b] = widths[b], widths[a]
        swapped.add(tuple(other))
    return (changed | swapped) - {widths}


def _undominated(spent: Floats, loss: Floats, budget: float) -> Integers:
    """Indices of the combinations within the budget that no other beats in cost and loss, the cheapest first."""
    order = np.lexsort((loss, spent))
    order = order[spent[order] <= budget]
    lowest_before = np.minimum.accumulate(np.concatenate(([math.inf], loss[order])))[:-1]
    order = order[loss[order] < lowest_before]
    if len(order) > MAX_COMBINATIONS:
        order = order[np.linspace(0, len(order) - 1, MAX_COMBINATIONS).astype(np.int64)]
    return order


def _check_same(costs: CostTable, proxy: Sensitivities) -> None:
    """Table and proxy are about the same layers and widths."""
    if len(costs.layers) != len(proxy.layers):
        raise ConfigError(
            f"costs of {len(costs.layers)} layers and sensitivities of {len(proxy.layers)}: measure the same model."
        )
    for layer, (layer_costs, increases) in enumerate(zip(costs.layers, proxy.layers, strict=True)):
        if layer_costs.keys() != increases.keys():
            raise ConfigError(
                f"layer {layer} has costs for the widths {sorted(layer_costs)} but sensitivities for "
                f"{sorted(increases)}: give both for the same candidates."
            )


def _cheapest(costs: CostTable, proxy: Sensitivities) -> list[int]:
    return [
        min(layer_costs, key=lambda width: (layer_costs[width], increases[width]))
        for layer_costs, increases in zip(costs.layers, proxy.layers, strict=True)
    ]


def _choice(costs: CostTable, proxy: Sensitivities, widths: Sequence[int]) -> Choice:
    return Choice(widths=tuple(widths), cost=costs.of(widths), expected_loss=proxy.expected_loss(widths))


def _layer_shapes(config: ModelConfig, width: int) -> list[tuple[int, ...]]:
    """Shapes of one layer's parameters; all layers are alike."""
    return [shape for name, shape in shapes_at(config, [width]).items() if layer_of(name) is not None]


def _elements(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
