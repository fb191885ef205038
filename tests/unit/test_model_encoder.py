"""The image encoder: widths as prefixes, what it sees, its loss and its trainer, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from braniac.model.encoder import Encoder, EncoderConfig, contrastive_loss, train_encoder
from braniac.model.errors import ConfigError, TrainingDiverged
from braniac.model.tiers import WidthMap, is_ffn

CONFIG = EncoderConfig(
    image_size=8,
    patch_size=4,
    num_channels=2,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    embedding_size=8,
)


def random_encoder() -> Encoder:
    """An encoder whose zero matrices were filled too."""
    encoder, dice = Encoder(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.normal_(std=0.3, generator=dice)
    return encoder


def images(count: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def noisy_pairs(batch: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random images, and the same with noise as strong as they are."""

    def pairs(step: int) -> tuple[Tensor, Tensor]:
        clean = images(batch, seed=2 * step)
        return clean, clean + images(batch, seed=2 * step + 1)

    return pairs


def test_embeddings_have_length_one_and_tell_images_apart() -> None:
    embeddings_BE = random_encoder()(images())
    assert embeddings_BE.shape == (5, 8)
    assert torch.allclose(embeddings_BE.norm(dim=1), torch.ones(5), atol=1e-6)
    assert torch.pdist(embeddings_BE).min() > 1e-2


def test_the_widths_of_a_configuration() -> None:
    assert CONFIG.widths == (64, 32, 16, 8)


@pytest.mark.parametrize("width", [None, 32, 8, 40, (64, 8), (8, 24)])
def test_an_extracted_copy_holds_a_prefix_and_embeds_as_the_whole_does_at_that_width(width: WidthMap) -> None:
    encoder = random_encoder()
    part = encoder.extract(width)
    assert torch.allclose(part(images()), encoder(images(), width), atol=1e-6)
    held = [len(p) for name, p in part.named_parameters() if "up_proj" in name]
    assert held == list(encoder.layer_widths(width))
    if width is not None:
        assert not torch.allclose(part(images()), encoder(images()), atol=1e-2)
    with torch.no_grad():
        part.embedding_proj.weight.zero_()
    assert encoder.embedding_proj.weight.any()


@pytest.mark.parametrize("width", [8, (16, 40)])
def test_gradients_beyond_the_width_are_exactly_zero(width: WidthMap) -> None:
    encoder = random_encoder()
    encoder(images(), width)[:, 0].sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None
        used = encoder.layer_widths(width)[int(name.split(".")[1])] if is_ffn(name) else len(p)
        assert p.grad[:used].any()
        assert not p.grad[used:].any()


def test_every_patch_reaches_every_other() -> None:
    encoder = random_encoder()
    seen = []
    encoder.layers[-1].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    one = images(1)
    for row, column in ((0, 0), (0, 7), (7, 0), (7, 7)):
        changed = one.clone()
        changed[0, 0, row, column] += 1.0
        encoder(torch.cat((one, changed)))
        before_TD, after_TD = seen.pop()
        assert (before_TD - after_TD).abs().amax(1).min() > 1e-5


def test_positions_matter() -> None:
    encoder, one = random_encoder(), images(1)
    mirrored = torch.cat((one[..., 4:], one[..., :4]), dim=-1)  # the same patches elsewhere
    assert not torch.allclose(encoder(one), encoder(mirrored), atol=1e-3)
    with torch.no_grad():
        encoder.embed_positions.weight.zero_()
    assert torch.allclose(encoder(one), encoder(mirrored), atol=1e-5)


def test_first_weights_depend_on_the_seed_and_make_each_block_the_identity() -> None:
    first, again, other = Encoder(CONFIG), Encoder(CONFIG), Encoder(CONFIG)
    for encoder, seed in ((first, 3), (again, 3), (other, 4)):
        encoder.init_weights(seed)
    assert torch.equal(first(images()), again(images()))
    assert not torch.allclose(first(images()), other(images()), atol=1e-2)
    assert torch.equal(first(images(), 8), first(images()))


def test_the_contrastive_loss_follows_its_definition() -> None:
    first, second = (random_encoder()(images(4, seed)).detach() for seed in (1, 9))
    expected = 0.0
    for i in range(4):
        for one, other in ((first, second), (second, first)):
            scores = [math.exp(float(one[i] @ other[j]) / 0.1) for j in range(4)]
            expected -= math.log(scores[i] / sum(scores)) / 8
    assert contrastive_loss(first, second).item() == pytest.approx(expected, rel=1e-4)
    assert contrastive_loss(torch.eye(4), torch.eye(4), 0.01).item() == pytest.approx(0.0, abs=1e-6)


def test_joint_training_lowers_the_loss_of_every_width() -> None:
    encoder, widths = Encoder(CONFIG), (64, 8, (8, 64))
    encoder.init_weights(0)
    first, second = noisy_pairs(16)(0)
    before = [contrastive_loss(encoder(first, width), encoder(second, width)).item() for width in widths]
    train_encoder(encoder, lambda step: (first, second), widths, steps=25)
    after = [contrastive_loss(encoder(first, width), encoder(second, width)).item() for width in widths]
    assert all(end < 0.5 * start for start, end in zip(before, after, strict=True)), (before, after)


def test_training_is_reproducible() -> None:
    first, second = random_encoder(), random_encoder()
    second(images()).sum().backward()  # gradients that somebody left behind do not count
    losses = [train_encoder(encoder, noisy_pairs(8), [64, 8], steps=3) for encoder in (first, second)]
    assert losses[0] == losses[1]
    assert torch.equal(first(images()), second(images()))
    assert not torch.allclose(first(images()), random_encoder()(images()), atol=1e-3)


def test_the_joint_loss_is_the_mean_over_the_widths() -> None:
    encoder = random_encoder()
    first, second = noisy_pairs(16)(0)
    each = [contrastive_loss(encoder(first, width), encoder(second, width)).item() for width in (64, 8)]
    assert train_encoder(encoder, noisy_pairs(16), [64, 8], steps=1) == [pytest.approx(sum(each) / 2, rel=1e-5)]


def test_training_narrow_widths_leaves_the_other_neurons_alone() -> None:
    encoder = random_encoder()
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    train_encoder(encoder, noisy_pairs(8), [16, 8], steps=2)
    for name, p in encoder.named_parameters():
        if is_ffn(name):
            assert torch.equal(p[16:], before[name][16:])
        assert not torch.equal(p[:16], before[name][:16])


def test_a_loss_that_is_not_finite_stops_training_before_the_weights_change() -> None:
    encoder = random_encoder()
    before = [p.detach().clone() for p in encoder.parameters()]
    bad = images(4) * math.nan
    with pytest.raises(TrainingDiverged, match="the loss is nan at step 0"):
        train_encoder(encoder, lambda step: (bad, bad), [64], steps=3)
    assert all(torch.equal(p, old) for p, old in zip(encoder.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (65, "width 65 in layer 0: choose one from 8 to 64"),
        (7, "choose one from 8 to 64"),
        (0, "choose one from 8 to 64"),
        ((64, 4), "width 4 in layer 1"),
        ((64,), "has 1 widths: give one for each of 2 layers"),
    ],
)
def test_a_width_that_does_not_exist_is_refused(width: WidthMap, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        random_encoder()(images(), width)


def test_an_extracted_copy_refuses_widths_that_it_does_not_hold() -> None:
    with pytest.raises(ConfigError, match="width 32 in layer 1: choose one from 8 to 16"):
        random_encoder().extract((64, 16))(images(), 32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("matformer_factor", 6, "encoder.matformer_factor is 6: it must be a power of two"),
        ("intermediate_size", 60, "cannot be divided by encoder.matformer_factor: make it a multiple of 8"),
        ("patch_size", 3, "encoder.image_size 8 cannot be divided by encoder.patch_size: make it a multiple of 3"),
        ("num_attention_heads", 3, "cannot be divided by encoder.num_attention_heads"),
        ("hidden_size", 0, "encoder.hidden_size is 0: it must be a whole number of at least 1"),
        ("embedding_size", 8.0, "encoder.embedding_size is 8.0"),
        ("num_hidden_layers", True, "encoder.num_hidden_layers is True"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(key: str, value: object, message: str) -> None:
    values = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    with pytest.raises(ConfigError, match=message):
        EncoderConfig(**{**values, key: value})


def test_images_of_another_shape_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="instead of"):
        random_encoder()(images()[:, :1])
