"""PPO balances a pole on a cart (Schulman et al., 2017; Barto et al., 1983): each process plays in carts of its own.

    python examples/ppo.py
    python examples/ppo.py --devices 2

The processes share what they learn: gradients are averaged, as always.
"""

import argparse

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import fabricfn as ff

NUM_CARTS = 16  # over all processes together
NUM_STEPS = 128  # of each cart between two updates
GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2
NUM_EPOCHS, NUM_MINIBATCHES = 4, 4


class Carts:
    """Carts with a pole on each, to be pushed left (0) or right (1); 1 for each step until the pole falls, 500 at most.

    A state is (place, speed, angle, turning speed), in metres, radians and seconds. A cart that is done starts afresh.
    """

    def __init__(self, num: int, seed: int):
        self.random = np.random.default_rng(seed)
        self.states = self.random.uniform(-0.05, 0.05, (num, 4))
        self.ages = np.zeros(num, dtype=int)
        self.lived: list[int] = []  # how long those lived that have ended

    def step(self, pushes: np.ndarray) -> np.ndarray:
        """Push each; returns which of them are done."""
        _, speed, angle, turning = self.states.T
        gravity, mass, pole_mass, half_length = 9.8, 1.1, 0.1, 0.5
        pull = (np.where(pushes == 1, 10.0, -10.0) + pole_mass * half_length * turning**2 * np.sin(angle)) / mass
        leverage = half_length * (4 / 3 - pole_mass * np.cos(angle) ** 2 / mass)
        turn = (gravity * np.sin(angle) - np.cos(angle) * pull) / leverage
        push = pull - pole_mass * half_length * turn * np.cos(angle) / mass
        self.states = self.states + 0.02 * np.stack([speed, push, turning, turn], axis=1)
        self.ages += 1

        done = (np.abs(self.states[:, 0]) > 2.4) | (np.abs(self.states[:, 2]) > 0.209) | (self.ages >= 500)
        self.lived += self.ages[done].tolist()
        self.states[done] = self.random.uniform(-0.05, 0.05, (done.sum(), 4))
        self.ages[done] = 0
        return done


class Agent(nn.Module):
    """(N, 4) states -> (N, 2) logits of the pushes, (N,) what a state is worth."""

    def __init__(self):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, states):
        return self.actor(states), self.critic(states).squeeze(-1)


def play(rt: ff.Runtime, agent: ff.Model, carts: Carts, random: torch.Generator) -> list[torch.Tensor]:
    """NUM_STEPS with each cart: states, pushes, their log probabilities, advantages and returns, a row a push."""
    states, pushes, logs, values, done = [], [], [], [], []
    for _ in range(NUM_STEPS):
        states.append(torch.tensor(carts.states, dtype=torch.float32))
        logits, value = (part.cpu() for part in ff.apply(rt, agent, ff.to_device(rt, states[-1])))
        pushes.append(torch.multinomial(logits.softmax(dim=1), 1, generator=random).squeeze(1))
        logs.append(Categorical(logits=logits).log_prob(pushes[-1]))
        values.append(value)
        done.append(torch.tensor(carts.step(pushes[-1].numpy())))
    _, after = ff.apply(rt, agent, ff.to_device(rt, torch.tensor(carts.states, dtype=torch.float32)))

    values.append(after.cpu())
    advantages, ahead = [], torch.zeros(len(carts.states))
    for step in reversed(range(NUM_STEPS)):
        error = 1 + GAMMA * values[step + 1] * ~done[step] - values[step]
        ahead = error + GAMMA * LAMBDA * ahead * ~done[step]
        advantages.insert(0, ahead)
    returns = [advantage + value for advantage, value in zip(advantages, values[:-1], strict=True)]
    return [torch.cat(rows).detach() for rows in (states, pushes, logs, advantages, returns)]


def loss_fn(net: nn.Module, states, pushes, logs, advantages, returns) -> torch.Tensor:
    logits, values = net(states)
    policy = Categorical(logits=logits)
    ratio = (policy.log_prob(pushes) - logs).exp()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    return -gain + 0.5 * (values - returns).square().mean() - 0.01 * policy.entropy().mean()


def train(rt: ff.Runtime, num_updates: int) -> list[float]:
    """How long poles stood on average, over all processes, in the games that ended before each update."""
    seed = 1000 * rt.seed + rt.rank  # other games on each rank
    carts, random = Carts(NUM_CARTS // rt.world_size, seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(rt.seed)
    agent = ff.setup_model(rt, Agent())
    opt = ff.setup_optimizer(rt, agent, torch.optim.Adam, lr=3e-3)
    grad_fn = ff.value_and_grad(rt, loss_fn)
    history = []
    for update in range(num_updates):
        played = ff.to_device(rt, play(rt, agent, carts, random))
        for _ in range(NUM_EPOCHS):
            for rows in torch.randperm(len(played[0]), generator=random).chunk(NUM_MINIBATCHES):
                _, grads = grad_fn(agent, *(column[rows] for column in played))
                grads, _ = ff.clip_gradients(rt, grads, max_norm=0.5)
                agent, opt = ff.optimizer_step(rt, agent, opt, grads, donate=True)
        total = ff.all_reduce(rt, {"steps": sum(carts.lived), "games": len(carts.lived)}, op="sum")
        carts.lived.clear()
        history.append(total["steps"] / max(total["games"], 1))
        ff.print(rt, f"update {update}: {total['games']} games of {history[-1]:.0f} steps")
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--updates", type=int, default=30)
    args = parser.parse_args()

    with ff.runtime(devices=args.devices, strategy=args.strategy, seed=0) as rt:
        history = train(rt, args.updates)
        assert max(history) > 4 * history[0]


if __name__ == "__main__":
    main()
