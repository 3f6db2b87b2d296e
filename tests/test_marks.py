"""Uses of images on which someone has marked the digit, each against a formula written out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena import data
from athena.experiments import marks
from athena.experiments.run import Run
from athena.experiments.training import train
from athena.experiments.uses import Use

BASE = Run(model="small", dataset="shortcut5k", fraction=0.05, tested="at the end", rule="Zero()")
MARKS = {"marked": 20, "every": 2}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 10)).double()


def images() -> data.Data:
    """Twenty marked images in float64."""
    found = data.load("shortcut5k", 0.01)
    return replace(found, train_images=found.train_images.double())


def set_up(use: str, **fields: object) -> tuple[Use, data.Data, Tensor, Tensor]:
    of = images()
    model = network()
    return (
        Use(replace(BASE, use=use, **(MARKS | fields)), model, "cpu", of),  # type: ignore[arg-type]
        of,
        of.train_images[20:26],
        of.train_labels[20:26],
    )


@pytest.mark.parametrize("use", marks.LOSSES)
def test_every_use_of_marks_trains_and_draws_the_same_again(use: str) -> None:
    run = replace(BASE, use=use, strength=0.1, **MARKS)  # type: ignore[arg-type]
    once, again = train(run, "cpu"), train(run, "cpu")
    assert once.diverged is None
    assert all(map(torch.equal, once.model.state_dict().values(), again.model.state_dict().values()))


def test_the_relevance_penalty_is_what_the_background_contributes_to_the_logits() -> None:
    use, of, x, y = set_up("relevance off mark", strength=0.3)
    marked = use.marked
    before = marked.generator.get_state()
    found = use.loss(x, y, None)
    marked.generator.set_state(before)
    index = marked.draw(6)
    mixed = torch.randn(6, 10, generator=marked.generator)
    penalties = []
    for image, off, mix in zip(of.train_images[index], marked.off[index], mixed, strict=True):
        jacobian = torch.func.jacrev(lambda at: use.model(at[None])[0])(image)
        of_logit = (jacobian * image * off).flatten(1).sum(1)  # LRP-0 on a ReLU network is gradient times input
        penalties.append((mix * of_logit).sum() ** 2)
    expected = F.cross_entropy(use.model(x), y) + 0.3 * torch.stack(penalties).mean()
    assert torch.allclose(found, expected, rtol=1e-5)


def test_the_gradient_penalty_is_that_of_right_for_the_right_reasons() -> None:
    use, of, x, y = set_up("gradient off mark", strength=0.3)
    before = use.marked.generator.get_state()
    found = use.loss(x, y, None)
    use.marked.generator.set_state(before)
    index = use.marked.draw(6)
    leaf = of.train_images[index].clone().requires_grad_()
    use.model(leaf).log_softmax(1).sum().backward()
    assert leaf.grad is not None
    expected = F.cross_entropy(use.model(x), y) + 0.3 * ((use.marked.off[index] * leaf.grad) ** 2).sum() / 6
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("use", ["relevance off mark", "gradient off mark"])
def test_a_penalty_reaches_every_weight_and_leaves_the_output_layer_s_bias(use: str) -> None:
    """Relevance off the digit does not depend on the biases of a ReLU network, but for which neurons are active."""
    made, _, x, y = set_up(use, strength=1e3)
    made.loss(x, y, None).backward()
    penalised = [parameter.grad for parameter in made.model.parameters()]
    plain = torch.autograd.grad(F.cross_entropy(made.model(x), y), list(made.model.parameters()))
    assert all(not torch.equal(ours, theirs) for ours, theirs in zip(penalised[::2], plain[::2], strict=True))


@pytest.mark.parametrize("use", ["masking", "gradient off mark", "relevance off mark"])
def test_marked_images_are_looked_at_in_one_step_of_so_many(use: str) -> None:
    made, _, x, y = set_up(use, every=3)
    plain = F.cross_entropy(made.model(x), y)
    assert [bool(made.loss(x, y, None) > plain + 1e-9) for _ in range(6)] == [True, False, False] * 2


def test_masking_keeps_the_digit_and_takes_the_background_of_another_marked_image() -> None:
    use, of, _, _ = set_up("masking")
    marked = use.marked
    index = torch.arange(20)
    before = marked.generator.get_state()
    found = marked.on_another_background(index)
    marked.generator.set_state(before)
    other = marked.draw(20)
    own = ~marked.off
    assert torch.equal(found[own], of.train_images[:20][own])
    both = marked.off & marked.off[other]
    assert torch.equal(found[both], of.train_images[other][both])
    filled = marked.off & ~marked.off[other]
    for image, of_other, off, where in zip(found, of.train_images[other], marked.off[other], filled, strict=True):
        assert torch.allclose(image[where], of_other[off].mean())


def test_marked_alone_never_looks_at_the_batch() -> None:
    use, _, x, y = set_up("marked alone")
    other, _, _, _ = set_up("marked alone")
    assert torch.equal(use.loss(x, y, None), other.loss(torch.zeros_like(x), y, None))


def test_the_shuffled_control_deals_the_same_masks_to_other_images() -> None:
    own, of, _, _ = set_up("relevance off mark")
    shuffled, _, _, _ = set_up("relevance off mark", control="shuffled")
    masks = [{mask.numpy().tobytes() for mask in use.marked.off} for use in (own, shuffled)]
    assert masks[0] == masks[1]
    assert not torch.equal(own.marked.off, shuffled.marked.off)
    assert of.train_masks is not None and torch.equal(own.marked.off[:, 0], ~of.train_masks[:20])


def test_marks_on_a_data_set_without_them_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Run\(dataset='mnist5k', marked=20\): nothing is marked"):
        train(replace(BASE, dataset="mnist5k", use="masking", marked=20), "cpu")


@pytest.mark.parametrize("use", marks.LOSSES)
def test_a_use_of_marked_images_needs_some(use: str) -> None:
    with pytest.raises(ValueError, match=r"marked=0\): it needs marked images"):
        Run(use=use)
