"""Other people's caches on a model small enough to run in the head: every block adds a number to every token."""

import pytest
import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

from ertacache.caches import pab as pyramid
from ertacache.caches import teacache as tea
from ertacache.caches.block_stack import cached_ranges
from ertacache.caches.delta_dit import delta_dit
from ertacache.caches.easycache import EasyCachePolicy, easycache
from ertacache.caches.pab import Broadcast, pab
from ertacache.caches.profilingdit import Cadence, Profile, profilingdit
from ertacache.caches.teacache import Fitting, TeaCachePolicy, teacache
from ertacache.numerics.blocks import blocks_of


class Block(torch.nn.Module):
    """Adds its own number times the time to both streams."""

    def __init__(self, number):
        super().__init__()
        self.number, self.calls = number, []

    def forward(self, hidden_states, encoder_hidden_states, temb):
        self.calls.append(temb.item())
        return encoder_hidden_states - self.number * temb, hidden_states + self.number * temb


class Model(ModelMixin, ConfigMixin, CacheMixin):
    """Blocks of 1, 10 and 100; returns (x, text) after them."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([Block(1), Block(10), Block(100)])

    def forward(self, x, text, temb):
        for block in self.transformer_blocks:
            text, x = block(x, encoder_hidden_states=text, temb=temb)
        return x, text


TransformerBlockRegistry.register(
    Block, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
)


@pytest.fixture(autouse=True)
def indicator(monkeypatch):
    monkeypatch.setitem(tea.INDICATORS, "Block", tea.time_indicator)


def run(model, times, branches=("cond",), x=0.0):
    """x after each call, for each branch; uncached, x = 111 · time."""
    found = {name: [] for name in branches}
    for time in times:
        for name in branches:
            with model.cache_context(name):
                x_out, text = model(torch.full((1, 2), x), torch.zeros(1, 3), torch.tensor(float(time)))
            assert torch.equal(text[0, :2], x - x_out[0])  # both streams are cached alike
            found[name].append(x_out[0, 0].item())
    model._reset_stateful_cache()  # as a pipeline does when its call ends
    return found[branches[0]] if len(branches) == 1 else found


def computed(model, place=0):
    calls, model.transformer_blocks[place].calls = model.transformer_blocks[place].calls, []
    return calls


def policy_of(*steps):
    return lambda state, block, arguments: state.step in steps


def test_a_range_reuses_its_difference_and_the_other_blocks_run():
    model = Model()
    _, second, third = blocks_of(model)
    with cached_ranges(model, [((second, third), policy_of(0, 2))]):
        # Steps 1 and 3 add 110 · (time of the last computed step), and block 1 runs in every step.
        assert run(model, [1, 2, 3, 4]) == [111, 112, 333, 334]
    assert computed(model, 0) == [1, 2, 3, 4] and computed(model, 2) == [1, 3]
    assert run(model, [1, 2]) == [111, 222]


def test_branches_do_not_mix_and_a_new_run_starts_without_memory():
    model = Model()
    with cached_ranges(model, [(blocks_of(model), policy_of(0))]):
        for _ in range(2):
            assert run(model, [1, 2], branches=("cond", "uncond")) == {"cond": [111, 111], "uncond": [111, 111]}
        assert run(model, [3, 4]) == [333, 333]


def test_a_failing_run_leaves_the_model_as_it_was():
    model = Model()
    with pytest.raises(RuntimeError), cached_ranges(model, [(blocks_of(model), policy_of(0))]):
        raise RuntimeError
    assert run(model, [1, 2]) == [111, 222]


def test_teacache_sums_changes_until_the_threshold():
    """Times 10, 11, 12, …: changes 1/10, 1/11, 1/12, …, doubled by the polynomial 2 x. δ = 0.5.

    Step 1: 0.2; 2: 0.382; 3: 0.548, computed; then 1/13, 1/14, 1/15, 1/16 doubled are 0.154, 0.297, 0.430, 0.555.
    """
    model = Model()
    with teacache(model, TeaCachePolicy(0.5, (2.0, 0.0), steps=9)):
        run(model, range(10, 19))
    assert computed(model) == [10, 13, 17, 18]  # the last step is always computed
    with teacache(model, TeaCachePolicy(0.5, (2.0, 0.0), steps=9, retained=3)):
        run(model, range(10, 19))
    assert computed(model) == [10, 11, 12, 16, 18]  # 2/12 + 2/13 + 2/14 = 0.46, + 2/15 = 0.60


def test_teacaches_polynomial_is_fitted_to_the_change_of_the_output():
    """The output is 111 · time from x = 0: it changes as the indicator does, so that P(x) = x."""
    model, fitting = Model(), Fitting()
    with fitting.watch(model):
        run(model, [10, 11, 13, 14, 18, 20, 27, 29])
    assert len(fitting.pairs) == 7 and len(computed(model)) == 8
    *high, slope, constant = fitting.coefficients()
    assert slope == pytest.approx(1, abs=1e-3) and constant == pytest.approx(0, abs=1e-3)
    assert max(map(abs, high)) < 1e-2


def test_delta_dit_reuses_back_blocks_early_and_front_blocks_late():
    """N = 2, N_c = 2 of three blocks, T = 6: the difference of blocks 2 and 3, then that of blocks 1 and 2."""
    model = Model()
    with delta_dit(model, steps=6, interval=2, count=2):
        found = run(model, [1, 2, 3, 4, 5, 6])
    #         computed, + 110·1, computed | computed, 11·4 + 100·5, computed
    assert found == [111, 2 + 110, 333, 444, 44 + 500, 666]
    with pytest.raises(ValueError, match="4 blocks to reuse, the model has 3"), delta_dit(model, 6, 2, 4):
        pass


def test_delta_dit_may_reuse_all_blocks():
    model = Model()
    with delta_dit(model, steps=6, interval=3, count=3):
        assert run(model, [1, 2, 3, 4, 5, 6]) == [111, 111, 111, 444, 444, 444]


def test_profilingdit_reuses_the_blocks_that_act_least_on_what_stands_out():
    """Of three tokens the last stands out. Block 2 acts on it alone, block 1 on the others, block 3 on all."""

    class Local(Block):
        def __init__(self, where):
            super().__init__(1.0)
            self.where = torch.tensor(where)

        def forward(self, hidden_states, encoder_hidden_states, temb):
            self.calls.append(temb.item())
            return encoder_hidden_states, hidden_states + self.where[None, :, None] * temb

    TransformerBlockRegistry.register(
        Local, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
    )
    model = Model()
    model.transformer_blocks = torch.nn.ModuleList(map(Local, ([1.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0])))

    def tokens(times):
        found = []
        for time in times:
            with model.cache_context("cond"):
                found.append(model(torch.zeros(1, 3, 2), torch.zeros(1, 1, 2), torch.tensor(float(time)))[0][0, :, 0])
        model._reset_stateful_cache()
        return torch.stack(found).tolist()

    with Profile(steps=2).watch(model) as profile:
        tokens([1, 2])
    assert profile.shares[0] == pytest.approx([0, 1, 1 / 3]) and profile.background(1 / 3) == [0]
    assert profile.background(2 / 3) == [0, 2]
    with profilingdit(model, [0], Cadence(interval=2, warmup=1)):
        found = tokens([1, 2, 3, 4])
    # Block 1 runs in steps 0 (warm-up), 1 and 3; in step 2 it adds what it added in step 1.
    assert [row[0] for row in found] == [2, 4, 2 + 3, 8] and [row[2] for row in found] == [6, 12, 18, 24]


class Same(torch.nn.Module):
    def forward(self, time):
        return time.clone()


class Attending(Block):
    """Adds the time that its attention was given, and a tenth of what its feed-forward was given."""

    def __init__(self):
        super().__init__(1)
        self.attn, self.ff = Same(), Same()

    def forward(self, hidden_states, encoder_hidden_states, temb):
        self.calls.append(temb.item())
        added = self.attn(temb) + self.ff(temb) / 10
        return encoder_hidden_states - added, hidden_states + added


TransformerBlockRegistry.register(
    Attending, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
)


def test_pab_reuses_each_kind_in_its_own_range_and_branch(monkeypatch):
    monkeypatch.setitem(pyramid.MODULES, "Attending", {"attn": "spatial", "ff": "mlp"})
    model = Model()
    model.transformer_blocks = torch.nn.ModuleList([Attending()])

    def now():
        return model.transformer_blocks[0].calls[-1]

    both = ("cond", "uncond")
    with pab(model, Broadcast(spatial=2, mlp=4, window=(0, 1000)), now):
        for _ in range(2):
            for found in run(model, [1, 2, 3, 4, 5], branches=both).values():
                assert found == pytest.approx([1.1, 1.1, 3.1, 3.1, 5.5])
    with pab(model, Broadcast(spatial=2, window=(1, 4)), now):  # at 2 the attention is reused, at 4 no more
        assert run(model, [1, 2, 3, 4]) == pytest.approx([1.1, 1.2, 3.3, 4.4])
    assert run(model, [1, 2]) == pytest.approx([1.1, 2.2])
    assert Broadcast.pyramid(2, (450, 930)) == Broadcast(2, 4, 6, 1, (450, 930))


def test_easycache_sums_expected_changes_until_the_threshold():
    """Inputs 1, 2, 3, 4, …, outputs ten times as much: k = 10, and a step expects 10 · 1 / |y| of the last output.

    τ = 0.5. Steps 0 and 1 are always computed, y = 20. Step 2: 0.5, computed, y = 30; 3: 0.333, 4: 0.667, computed,
    y = 50; 5, 6: 0.2, 0.4; 7: 0.6, computed, y = 80; 8, 9: 0.125, 0.25; 10 is the last.
    """
    policy, computed = EasyCachePolicy(0.5, steps=11, retained=2), []
    for step in range(11):
        x = torch.tensor([1.0 + step])
        if policy.computes(step, x):
            policy.computed(x, 10 * x)
            computed.append(step)
    assert computed == [0, 1, 2, 4, 7, 10]


def test_easycache_adds_what_the_model_added_in_each_branch():
    """x = 0 never changes, so that from the third step on nothing is expected to change either."""
    model = Model()
    with easycache(model, 5, threshold=0.1, retained=2):
        for _ in range(2):  # a new run starts without memory
            found = run_whole(model, [1, 2, 3, 4, 5])
            assert found == {"cond": [111, 222, 222, 222, 555], "uncond": [111, 222, 222, 222, 555]}
    assert computed(model) == [1, 1, 2, 2, 5, 5] * 2


def run_whole(model, times):
    """x after each call of both branches, for a cache of whole calls, which returns no text."""
    found = {"cond": [], "uncond": []}
    for time in times:
        for name, values in found.items():
            with model.cache_context(name):
                values.append(model(torch.zeros(1, 2), torch.zeros(1, 3), torch.tensor(float(time)))[0][0, 0].item())
    model._reset_stateful_cache()
    return found
