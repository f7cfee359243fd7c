"""How much a study trains and draws."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Numbers of a study.  What is larger costs in proportion, but for scenes (made once)."""

    what: str  # for people
    seeds: int = 3
    scenes: int  # single things that arms are trained on, 64 px
    large_scenes: int  # of them at 128 px, for the row on qk norm
    steps: int  # of an arm
    batch_size: int
    learning_rate: float = 2e-3
    depths: tuple[int, ...] = (1, 2, 3)  # smallest ... largest; the middle one is the base arm
    sampling_steps: tuple[int, ...] = (5, 10, 25, 50)
    pictures: int  # that an arm draws for its scores
    prompts: int  # of each category, that the shipped model draws
    large_steps: int  # of an arm at 128 px, after its steps at 64
    vae_steps: int
    vae_batch_size: int
    dpo_pairs: int  # prompts of which two pictures are compared
    dpo_steps: int

    def __post_init__(self) -> None:
        if self.seeds < 3:
            raise ValueError(f"seeds is {self.seeds}; an interval takes at least 3.")

    @property
    def base_depth(self) -> int:
        return self.depths[len(self.depths) // 2]


BUDGETS = {
    "half-hour": Budget(
        what="about 45 minutes of one core",
        scenes=4096,
        large_scenes=1024,
        steps=500,
        batch_size=16,
        learning_rate=3e-3,
        pictures=64,
        prompts=8,
        large_steps=80,
        vae_steps=150,
        vae_batch_size=8,
        dpo_pairs=96,
        dpo_steps=60,
    ),
    "night": Budget(
        what="a night of two cores",
        seeds=5,
        scenes=24_000,
        large_scenes=4096,
        steps=2000,
        batch_size=64,
        learning_rate=1e-3,
        pictures=128,
        prompts=16,
        large_steps=200,
        vae_steps=2000,
        vae_batch_size=16,
        dpo_pairs=512,
        dpo_steps=300,
    ),
    "gpu": Budget(
        what="about half an hour of a large GPU, by estimate",
        seeds=5,
        scenes=100_000,
        large_scenes=16_000,
        steps=4000,
        batch_size=256,
        learning_rate=1e-3,
        depths=(1, 2, 3),
        pictures=512,
        prompts=64,
        large_steps=500,
        vae_steps=4000,
        vae_batch_size=64,
        dpo_pairs=2048,
        dpo_steps=500,
    ),
}


def find_budget(name: str) -> Budget:
    """Raises ValueError for a name that is none of BUDGETS."""
    if name not in BUDGETS:
        known = "; ".join(f"{key}: {budget.what}" for key, budget in BUDGETS.items())
        raise ValueError(f"budget is {name!r}; choose one of these. {known}.")
    return BUDGETS[name]
