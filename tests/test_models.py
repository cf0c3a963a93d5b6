"""Models of one process, from a module and back: modes, devices, memory, and modules that cannot be one."""

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.sharding import local_of, whole
from tests.support.gradients import Net, data, fresh, loss_fn


def test_modes_are_as_the_user_left_them(rt):
    module = fresh()
    module.norm.eval()
    model = ff.setup_model(rt, module)
    assert "norm" not in model.training and "encoder" in model.training
    assert ff.train_mode(ff.eval_mode(model)).training == model.training
    assert ff.eval_mode({"a": model})["a"].training == frozenset()
    assert "norm" in ff.train_mode(ff.setup_model(rt, fresh().eval())).training
    _, grads = ff.value_and_grad(rt, loss_fn)(model, data(8, 4), data(8, 4, seed=2))
    assert set(grads.new_buffers) == {"seen"}


def test_the_users_module_is_never_changed(rt):
    module = fresh()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hooks = len(module._forward_pre_hooks)
    model = ff.setup_model(rt, module)
    _, grads = ff.value_and_grad(rt, loss_fn)(model, data(8, 4), data(8, 4, seed=2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    ff.optimizer_step(rt, model, opt, grads, donate=True)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert len(module._forward_pre_hooks) == hooks and all(p.grad is None for p in module.parameters())


def test_a_plain_module_comes_back(rt):
    model = ff.map_params(lambda a: 2 * a, ff.setup_model(rt, fresh()))
    module = ff.to_module(rt, model)
    assert type(module) is Net and module.decoder.weight is module.encoder.weight
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in fresh().parameters()]
    assert torch.equal(module.encoder.weight, 2 * fresh().encoder.weight) and module.training
    assert not module._forward_pre_hooks and not module._forward_hooks
    module(data(8, 4).double()).mean().backward()
    assert all(torch.equal(value, whole(model.params[name])) for name, value in ff.gather_params(rt, model).items())


def test_lazy_parameters_are_refused(rt):
    with pytest.raises(ff.ModelError, match=r"uninitialised \(lazy\) parameters: weight"):
        ff.setup_model(rt, nn.LazyLinear(3))


def test_a_donated_module_is_taken_over(rt):
    module = nn.Linear(4, 1).double()
    weight = module.weight
    model = ff.setup_model(rt, module, donate=True)
    shared = rt.strategy.shard is None  # what is cut is copied
    assert (local_of(model.params["weight"]).data_ptr() == weight.data_ptr()) is shared
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).mean())(model, data(6, 4))
    torch.testing.assert_close(whole(grads.params["weight"]), data(6, 4).mean(0, keepdim=True))


def test_devices_of_modules():
    rt = ff.Runtime(
        world=ff.World(device=torch.device("meta")),
        precision=ff.Precision.parse(64),
        strategy=ff.strategies.single(),
    )
    module = nn.Linear(4, 1)
    assert ff.setup_model(rt, module).params["weight"].device.type == "meta"
    assert ff.setup_model(rt, module, move_to_device=False).params["weight"].device.type == "cpu"
    assert ff.init_module(rt, lambda: nn.Linear(4, 1)).weight.device.type == "meta"
    assert module.weight.device.type == "cpu"


def test_parameters_without_memory_are_refused(rt):
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    if rt.strategy.shard is not None:  # they get their values when they are cut
        assert whole(ff.setup_model(rt, module).params["weight"]).isfinite().all()
        return
    with pytest.raises(ff.ModelError, match="init_module"):
        ff.setup_model(rt, module)


def test_a_persistent_buffer_that_changes_its_shape_is_refused(rt):
    class Grows(nn.Linear):
        def forward(self, x):
            self.cache = torch.cat([self.cache, x.detach()])
            return super().forward(x)

    module = Grows(4, 1)
    module.register_buffer("cache", torch.zeros(0, 4))
    with pytest.raises(ff.ModelError, match="persistent=False"):
        ff.value_and_grad(rt, lambda net, x: net(x).mean())(ff.setup_model(rt, module), data(2, 4))


def test_state_that_no_record_holds_is_refused(rt):
    class Lazy(nn.Linear):
        def forward(self, x):
            self.state = x.detach().mean()
            return super().forward(x)

    module = Lazy(4, 1)
    module.register_buffer("state", None)
    with pytest.raises(ff.ModelError, match="was None when the module was set up"):
        ff.value_and_grad(rt, lambda net, x: net(x).mean())(ff.setup_model(rt, module), data(2, 4))


def test_hooks_on_parameters_are_refused(rt):
    module = nn.Linear(4, 1)
    module.weight.register_hook(lambda grad: 0 * grad)
    with pytest.raises(ff.ModelError, match="hooks of their own.*: weight"):
        ff.setup_model(rt, module)


def test_a_module_that_keeps_an_activation_can_be_copied_later(rt):
    class Keeps(nn.Linear):
        def forward(self, x):
            self.attention = super().forward(x)
            self.history = [self.attention]
            return self.attention

    model = ff.setup_model(rt, Keeps(4, 1))
    ff.value_and_grad(rt, lambda net, x: net(x).mean())(model, data(2, 4))
    assert ff.apply(rt, model, data(2, 4)).shape == (2, 1)
    assert ff.to_module(rt, model)(data(2, 4)).shape == (2, 1)


def test_a_model_is_data_and_says_so(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(AttributeError, match=r"no 'state_dict': it is data.*ff\.to_module"):
        model.state_dict()
