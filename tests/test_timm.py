"""timm's ViT, DeiT and EVA by SDPA redirection. Skipped where timm is absent: it brings torchvision."""

from __future__ import annotations

import pytest
import torch

import linearize

timm = pytest.importorskip("timm", reason="the extra timm is not installed (it brings torchvision)")

#: name -> (image, patches, tokens before them)
MODELS = {
    "vit_tiny_patch16_224": ((64, 32), 8, 1),
    "deit_tiny_distilled_patch16_224": ((32, 64), 8, 2),
    "eva02_tiny_patch14_224": ((28, 56), 8, 1),
}


def made(name):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, depth=2, img_size=MODELS[name][0]).eval()


def images(name, batch=2):
    return torch.randn(batch, 3, *MODELS[name][0], generator=torch.Generator().manual_seed(1))


def one(model):
    return model(torch.zeros(1, 3, *model.patch_embed.img_size))


@pytest.mark.parametrize("name", MODELS)
def test_family(name):
    model, x = made(name), images(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    sites = linearize.find(model)
    assert len(sites) == 2 and all(site.seam == "sdpa" and site.shape.image for site in sites)
    with torch.no_grad():
        expected = model(x)
        linearize.attach(model, None, "softmax", probe=one)
        assert torch.equal(model(x), expected)
    for method, settings in (("hedgehog", {}), ("lit", {}), ("clear", {"radius": 2})):
        surgery = linearize.attach(model, None, method, settings, probe=one)
        out = model(x)
        assert not torch.equal(out, expected)
        out.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in surgery.parameters())
        other = made(name)
        linearize.attach(other, None, method, settings, probe=one)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), out)
        surgery.detach()
        with torch.no_grad():
            assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_grid_and_prefix(name):
    model, (rows_columns, patches, prefix) = made(name), MODELS[name]
    surgery, seen = linearize.attach(model, None, "clear", {"radius": 99}, probe=one), []
    with surgery.watch(lambda site, mixer, q, k, v, ctx, out: seen.append(ctx)), torch.no_grad():
        model(images(name))
    assert {(ctx.grid, ctx.prefix) for ctx in seen} == {
        ((2, 4) if rows_columns[0] < rows_columns[1] else (4, 2), prefix)
    }
    with torch.no_grad(), surgery.teacher():
        expected = model(images(name))
    with torch.no_grad():
        torch.testing.assert_close(model(images(name)), expected, rtol=0, atol=1e-5)  # beyond the diagonal: the teacher
    assert seen[0].grid[0] * seen[0].grid[1] == patches
