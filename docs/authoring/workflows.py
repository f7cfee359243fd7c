"""The workflows of the pack, described once; `python docs/authoring workflows` writes them.

To add one: write a function here that takes a Graph and adds groups and nodes to it, let its
docstring say what the workflow shows (it becomes the note beside the nodes, in Markdown), and put
`@workflow("its-file-name")` above it.  Then run the command, open the file in ComfyUI, and make its
thumbnail with `python docs/authoring thumbnails --only its-file-name`.

    @workflow("two-words")
    def two_words(graph: Graph) -> None:
        '''A picture of two words.'''
        load = load_checkpoint(graph, BUILT_IN)
        ...
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ...nodes.files import EMBEDDED
from ...sd3_core.presets import PRESETS, Preset, SkipLayerPreset
from .graph import Graph, ModelFile, Node, Output
from .node_shapes import NodeShape

STABILITY = "https://huggingface.co/stabilityai"
ENCODERS = "https://huggingface.co/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/text_encoders"
CONTROLNETS = (
    "https://huggingface.co/Comfy-Org/stable-diffusion-3.5-controlnets_ComfyUI_repackaged/resolve/"
    "main/split_files/controlnet"
)


def released(model: str, name: str) -> ModelFile:
    """A checkpoint where its makers publish it; they ask that their licence be accepted first."""
    return ModelFile(name, "checkpoints", f"{STABILITY}/{model}/resolve/main/{name}")


def encoder(name: str, optional: bool = False) -> ModelFile:
    return ModelFile(name, "text_encoders", f"{ENCODERS}/{name}", optional)


SD3_MEDIUM = released("stable-diffusion-3-medium", "sd3_medium_incl_clips.safetensors")
MEDIUM = released("stable-diffusion-3.5-medium", "sd3.5_medium.safetensors")
LARGE = released("stable-diffusion-3.5-large", "sd3.5_large.safetensors")
TURBO = released("stable-diffusion-3.5-large-turbo", "sd3.5_large_turbo.safetensors")
CLIPS = (encoder("clip_l.safetensors"), encoder("clip_g.safetensors"))
T5 = "t5xxl_fp16.safetensors"
CANNY = "sd3.5_large_controlnet_canny.safetensors"
CANNY_FILE = ModelFile(CANNY, "controlnet", f"{CONTROLNETS}/{CANNY}")
LORA = ModelFile("my_style.safetensors", "loras")

TINY = PRESETS["sd3_tiny"]
SEED = 1
LIGHTHOUSE = "a lighthouse on a cliff in morning fog, oil on canvas, visible brush strokes"

WORKFLOWS: dict[str, Callable[[Graph], None]] = {}


def workflow(name: str) -> Callable[[Callable[[Graph], None]], Callable[[Graph], None]]:
    """name: of its files, without an ending."""

    def add(describe: Callable[[Graph], None]) -> Callable[[Graph], None]:
        WORKFLOWS[name] = describe
        return describe

    return add


def describe(name: str, shapes: Mapping[str, NodeShape]) -> Graph:
    about = inspect.getdoc(WORKFLOWS[name]) or ""
    graph = Graph(name, shapes, about)
    WORKFLOWS[name](graph)
    return graph


# Parts that several share


def load_built_in(graph: Graph) -> Node:
    """The model in the pack; the note says which others would do."""
    graph.group("Load the model")
    return graph.node("SD3LoadCheckpoint", ckpt_name=EMBEDDED)


def load_released(graph: Graph, file: ModelFile) -> Node:
    """Checkpoint and text encoders, those beside the checkpoint found by themselves."""
    clips = () if file is SD3_MEDIUM else CLIPS
    graph.group("Load the model")
    return graph.node(
        "SD3LoadCheckpoint", (file, *clips, encoder(T5, optional=True)), ckpt_name=file.name
    )


def encode(graph: Graph, load: Node, prompt: str | Output, **settings: Any) -> Node:
    return graph.node("SD3EncodePrompt", clip=load["CLIP"], prompt=prompt, **settings)


def empty(graph: Graph, load: Node) -> Node:
    """As many pixels as the model was trained on."""
    return graph.node("SD3EmptyLatent", model=load["MODEL"])


def schedule(graph: Graph, preset: Preset, **settings: Any) -> Node:
    chosen = {"steps": preset.steps, "shift": preset.shift, "scheduler": preset.scheduler}
    return graph.node("SD3ShiftSchedule", **{**chosen, **settings})


def sample(
    graph: Graph,
    preset: Preset,
    model: Output,
    words: Node,
    latent: Output,
    sigmas: Node,
    seed: int | Output = SEED,
    **settings: Any,
) -> Node:
    chosen = {"seed": seed, "cfg": preset.cfg, "sampler_name": "auto"}
    return graph.node(
        "SD3Sample",
        model=model,
        positive=words["positive"],
        negative=words["negative"],
        latent_image=latent,
        sigmas=sigmas["SIGMAS"],
        **{**chosen, **settings},
    )


def skipping(preset: SkipLayerPreset | None) -> dict[str, Any]:
    """The widgets of skip-layer guidance."""
    assert preset is not None
    return {
        "cfg": preset.cfg,
        "slg_scale": preset.scale,
        "slg_layers": ", ".join(map(str, preset.layers)),
        "slg_start_percent": preset.start,
        "slg_end_percent": preset.end,
    }


def save(graph: Graph, latent: Node, load: Node, name: str = "") -> None:
    picture = graph.node("SD3VAEDecode", samples=latent["LATENT"], vae=load["VAE"])
    prefix = f"sd3/{graph.name}-{name}" if name else f"sd3/{graph.name}"
    graph.node("SaveImage", images=picture["IMAGE"], filename_prefix=prefix)


def text_to_image(
    graph: Graph, load: Node, preset: Preset, prompt: str, negative: str = "", **settings: Any
) -> None:
    """From a loaded model to a saved picture."""
    graph.group("Say what to draw")
    words = encode(graph, load, prompt, negative=negative)
    latent = empty(graph, load)
    graph.group("Draw")
    sigmas = schedule(graph, preset)
    drawn = sample(graph, preset, load["MODEL"], words, latent["LATENT"], sigmas, **settings)
    graph.group("Look")
    save(graph, drawn, load)


# A model each


@workflow("first-picture")
def first_picture(graph: Graph) -> None:
    """
    **A picture at once, with the model that comes with this pack.** Press *Run*.

    SD3 Tiny knows one to four circles, squares, triangles, stars, rings and crosses, in red,
    orange, yellow, green, cyan, blue, purple or pink, small or large, where you say (*top left*,
    *left of*, *above* ...), on white, grey or black, and words of up to three letters.

    It is built like Stable Diffusion 3, only a thousand times smaller. For SD3.5 choose its file in
    *SD3 Load Checkpoint*; nothing else has to change, though its own workflow has better settings.
    """
    load = load_built_in(graph)
    text_to_image(graph, load, TINY, "two red circles left of a blue square on a white background")


@workflow("sd3-medium")
def sd3_medium(graph: Graph) -> None:
    """
    **Stable Diffusion 3 Medium.** The checkpoint holds both CLIPs. T5 is used if its file is there;
    without it long prompts and lettering suffer, and nothing else.
    """
    preset = PRESETS["sd3_medium"]
    text_to_image(graph, load_released(graph, SD3_MEDIUM), preset, LIGHTHOUSE)


@workflow("sd3.5-medium")
def sd35_medium(graph: Graph) -> None:
    """
    **Stable Diffusion 3.5 Medium, with skip-layer guidance.** Early in the run the picture is
    pushed away from what the model draws without its blocks 7, 8 and 9: bodies and hands hold
    together better. `slg_scale` 0 turns it off; then `cfg` 4.5 is the usual value.

    T5 is used if its file is there.
    """
    preset = PRESETS["sd3.5_medium"]
    load = load_released(graph, MEDIUM)
    prompt = "a dancer leaping over a puddle in the rain, street photograph, reflections"
    text_to_image(graph, load, preset, prompt, **skipping(preset.skip_layers))


@workflow("sd3.5-large")
def sd35_large(graph: Graph) -> None:
    """
    **Stable Diffusion 3.5 Large.** The largest of the family: 16 GB of weights, loaded in part on
    smaller cards. T5 is used if its file is there.
    """
    preset = PRESETS["sd3.5_large"]
    prompt = 'a bookshop window at dusk, a hand-painted sign that says "OPEN LATE", warm light'
    text_to_image(graph, load_released(graph, LARGE), preset, prompt, "blurry, low quality")


@workflow("sd3.5-large-turbo")
def sd35_large_turbo(graph: Graph) -> None:
    """
    **Stable Diffusion 3.5 Large Turbo.** Four steps. At `cfg` 1 the negative prompt does not count.
    T5 is used if its file is there.
    """
    preset = PRESETS["sd3.5_large_turbo"]
    text_to_image(graph, load_released(graph, TURBO), preset, LIGHTHOUSE)


# From a picture


@workflow("image-to-image")
def image_to_image(graph: Graph) -> None:
    """
    **From one picture to another.** The first is drawn here, so that the workflow runs as it is;
    the second starts from it, with other words. `denoise` in the second schedule says how much may
    change: 0.3 little, 0.9 nearly everything.

    *Your own picture:* add *Load Image* and *Upscale Image* (1024 x 1024 for SD3 and SD3.5) and
    connect them to `pixels` of *SD3 VAE Encode*.

    *SD3.5 instead of the built-in model:* choose its file in *SD3 Load Checkpoint*.
    """
    load = load_built_in(graph)
    pixels = first_of_two(graph, load, "two red circles on a white background")
    graph.group("The second picture")
    words = encode(graph, load, "two blue stars on a white background", negative="")
    start = graph.node("SD3VAEEncode", pixels=pixels, vae=load["VAE"])
    sigmas = schedule(graph, TINY, denoise=0.75)
    graph.group("Draw over the first")
    drawn = sample(graph, TINY, load["MODEL"], words, start["LATENT"], sigmas)
    save(graph, drawn, load)


def first_of_two(graph: Graph, load: Node, prompt: str) -> Output:
    """A picture that the rest of a workflow starts from."""
    graph.group("The first picture")
    words = encode(graph, load, prompt, negative="")
    latent = empty(graph, load)
    sigmas = schedule(graph, TINY)
    graph.group("Draw it")
    drawn = sample(graph, TINY, load["MODEL"], words, latent["LATENT"], sigmas)
    picture = graph.node("SD3VAEDecode", samples=drawn["LATENT"], vae=load["VAE"])
    graph.node("PreviewImage", images=picture["IMAGE"])
    return picture["IMAGE"]


@workflow("inpainting")
def inpainting(graph: Graph) -> None:
    """
    **Paint a part anew.** The first picture is drawn here, so that the workflow runs as it is.
    White in the mask is painted anew, black stays; this mask is a square in the middle, stretched
    to the size of the picture.

    *Your own picture and mask:* add *Load Image*, paint the mask in its Mask Editor, and connect
    `IMAGE` and `MASK` to *SD3 VAE Encode* (1024 x 1024 pixels or about as many for SD3 and SD3.5).

    *SD3.5 instead of the built-in model:* choose its file in *SD3 Load Checkpoint*.
    """
    load = load_built_in(graph)
    pixels = first_of_two(graph, load, "a large red circle on a white background")
    graph.group("The mask")
    black = graph.node("SolidMask", title="Black: kept", value=0.0, width=64, height=64)
    white = graph.node("SolidMask", title="White: painted anew", value=1.0, width=32, height=32)
    mask = graph.node(
        "MaskComposite",
        destination=black["MASK"],
        source=white["MASK"],
        x=16,
        y=16,
        operation="add",
    )
    start = graph.node("SD3VAEEncode", pixels=pixels, vae=load["VAE"], mask=mask["MASK"])
    graph.group("What to paint there")
    words = encode(graph, load, "a small blue star on a white background", negative="")
    sigmas = schedule(graph, TINY)
    graph.group("Paint")
    drawn = sample(graph, TINY, load["MODEL"], words, start["LATENT"], sigmas)
    save(graph, drawn, load)


# Additions to a model


@workflow("lora")
def lora(graph: Graph) -> None:
    """
    **A LoRA for SD3.5 Medium.** Choose yours in *SD3 Load LoRA*; after a run it says how many of
    the file's layers found their place. `strength` 0 is the model alone. A LoRA belongs to the
    model it was trained on: Medium and Large are different networks.
    """
    preset = PRESETS["sd3.5_medium"]
    load = load_released(graph, MEDIUM)
    changed = graph.node(
        "SD3LoadLoRA",
        [LORA],
        model=load["MODEL"],
        clip=load["CLIP"],
        lora_name=LORA.name,
        strength=0.8,
    )
    graph.group("Say what to draw")
    words = encode(graph, changed, LIGHTHOUSE, negative="")
    latent = empty(graph, load)
    graph.group("Draw")
    sigmas = schedule(graph, preset)
    drawn = sample(graph, preset, changed["MODEL"], words, latent["LATENT"], sigmas)
    graph.group("Look")
    save(graph, drawn, load)


@workflow("controlnet")
def controlnet(graph: Graph) -> None:
    """
    **Edges lead the picture.** Canny edges of a photograph, and the ControlNet of SD3.5 Large that
    follows them. `strength` says how closely; `end_percent` below 1 leaves the last steps free.

    A ControlNet fits the model it was trained for: this one SD3.5 Large, not Medium and not the
    built-in model.
    """
    preset = PRESETS["sd3.5_large"]
    load = load_released(graph, LARGE)
    net = graph.node("ControlNetLoader", [CANNY_FILE], control_net_name=CANNY)
    graph.group("Find the edges")
    photograph = graph.node("LoadImage", image="example.png")
    scaled = graph.node(
        "ImageScale",
        image=photograph["IMAGE"],
        upscale_method="lanczos",
        width=1024,
        height=1024,
        crop="center",
    )
    edges = graph.node("Canny", image=scaled["IMAGE"])
    graph.node("PreviewImage", images=edges["IMAGE"])
    graph.group("Say what to draw")
    words = encode(graph, load, LIGHTHOUSE, negative="")
    led = graph.node(
        "ControlNetApplyAdvanced",
        positive=words["positive"],
        negative=words["negative"],
        control_net=net["CONTROL_NET"],
        image=edges["IMAGE"],
        vae=load["VAE"],
        strength=0.7,
    )
    latent = empty(graph, load)
    graph.group("Draw")
    sigmas = schedule(graph, preset)
    drawn = sample(graph, preset, load["MODEL"], led, latent["LATENT"], sigmas)
    graph.group("Look")
    save(graph, drawn, load)


# Side by side


@workflow("encoder-dropout")
def encoder_dropout(graph: Graph) -> None:
    """
    **One prompt, four sets of text encoders.** SD3 learnt with each encoder left out now and then,
    so it still draws when one is missing: zeros stand in its place. Here is what each is worth,
    with the same seed. For prompts of one line T5 changes little, and it needs the most memory.

    *SD3.5 instead of the built-in model:* choose its file in *SD3 Load Checkpoint*.
    """
    load = load_built_in(graph)
    prompt = graph.node(
        "PrimitiveStringMultiline",
        title="Prompt for all four",
        value="a large green ring above two small orange squares",
    )
    seed = graph.node("PrimitiveInt", title="Seed for all four", value=SEED)
    latent = empty(graph, load)
    sigmas = schedule(graph, TINY)
    for name, off in (
        ("all three", ()),
        ("without T5", ("use_t5",)),
        ("T5 alone", ("use_clip_l", "use_clip_g")),
        ("CLIP-L alone", ("use_clip_g", "use_t5")),
    ):
        graph.group(name[0].upper() + name[1:])
        words = encode(graph, load, prompt["STRING"], negative="", **dict.fromkeys(off, False))
        drawn = sample(
            graph, TINY, load["MODEL"], words, latent["LATENT"], sigmas, seed=seed["INT"]
        )
        save(graph, drawn, load, name.replace(" ", "-"))


@workflow("shift")
def shift(graph: Graph) -> None:
    """
    **One prompt and seed, three shifts.** The shift bends the noise levels of a run: a large one
    spends more steps at high noise, where the layout is decided, a small one more at low noise,
    where details are. The released models were made for 3 at one megapixel. Each schedule draws its
    curve after a run.

    *SD3.5 instead of the built-in model:* choose its file in *SD3 Load Checkpoint*.
    """
    load = load_built_in(graph)
    words = encode(graph, load, "three purple triangles below a yellow star", negative="")
    seed = graph.node("PrimitiveInt", title="Seed for all three", value=SEED)
    latent = empty(graph, load)
    for value in (1.0, 3.0, 6.0):
        graph.group(f"Shift {value:g}")
        sigmas = schedule(graph, TINY, shift=value)
        drawn = sample(
            graph, TINY, load["MODEL"], words, latent["LATENT"], sigmas, seed=seed["INT"]
        )
        save(graph, drawn, load, f"{value:g}")


@workflow("sweep")
def sweep(graph: Graph) -> None:
    """
    **Two settings at once, measured.** *SD3 Sweep* draws the prompt for every pair of values in one
    labelled grid, with models and prompts loaded once. Under the node stands what each cell cost
    and how it went: seconds, how long the latents' path was (x 1 is a straight line), how far the
    picture is from the framed reference, and whether it shows what was asked for.

    Other axes: `encoders` with `all, clip_l+clip_g, clip_l, t5`, `shift`, `sampler_name`, `seed`,
    `lora_strength` behind a LoRA. Connect `table` or `csv` to keep the numbers.

    *SD3.5 instead of the built-in model:* choose its file in *SD3 Load Checkpoint*; nothing is
    judged then.
    """
    load = load_built_in(graph)
    latent = empty(graph, load)
    graph.group("Vary")
    varied = graph.node(
        "SD3Sweep",
        model=load["MODEL"],
        clip=load["CLIP"],
        vae=load["VAE"],
        latent_image=latent["LATENT"],
        prompt="a large yellow star on a black background",
        x_axis="steps",
        x_values="5, 10, 20, 40",
        y_axis="cfg",
        y_values="1, 3, 6",
        seed=SEED,
        steps=TINY.steps,
        cfg=TINY.cfg,
        sampler_name="auto",
        scheduler=TINY.scheduler,
    )
    graph.group("Look")
    graph.node("SaveImage", images=varied["grid"], filename_prefix=f"sd3/{graph.name}")


# Ours and ComfyUI's together


@workflow("our-loader-ksampler")
def our_loader_ksampler(graph: Graph) -> None:
    """
    **Our loader, ComfyUI's nodes.** MODEL, CLIP and VAE are ComfyUI's own kinds, so every node that
    takes them works: here CLIP Text Encode, KSampler and VAE Decode.

    *SD3.5 instead of the built-in model:* choose its file in *SD3 Load Checkpoint*.
    """
    load = load_built_in(graph)
    graph.group("Say what to draw")
    positive = graph.node(
        "CLIPTextEncode",
        title="Prompt",
        clip=load["CLIP"],
        text="a yellow star in the centre on a black background",
    )
    negative = graph.node("CLIPTextEncode", title="Negative prompt", clip=load["CLIP"], text="")
    latent = empty(graph, load)
    graph.group("Draw")
    drawn = graph.node(
        "KSampler",
        model=load["MODEL"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent["LATENT"],
        seed=SEED,
        steps=TINY.steps,
        cfg=TINY.cfg,
        sampler_name=TINY.sampler,
        scheduler=TINY.scheduler,
    )
    graph.group("Look")
    picture = graph.node("VAEDecode", samples=drawn["LATENT"], vae=load["VAE"])
    graph.node("SaveImage", images=picture["IMAGE"], filename_prefix=f"sd3/{graph.name}")


@workflow("native-loader-sd3sample")
def native_loader_sd3sample(graph: Graph) -> None:
    """
    **ComfyUI's loaders, our sampler.** SD3 Sample takes any SD3 MODEL. It brings skip-layer
    guidance and a window for `cfg`, and says what it did, for people and in /history.
    """
    preset = PRESETS["sd3.5_medium"]
    graph.group("Load the model")
    load = graph.node("CheckpointLoaderSimple", [MEDIUM], ckpt_name=MEDIUM.name)
    text = graph.node(
        "TripleCLIPLoader",
        [*CLIPS, encoder(T5)],
        clip_name1="clip_l.safetensors",
        clip_name2="clip_g.safetensors",
        clip_name3=T5,
    )
    graph.group("Say what to draw")
    words = encode(graph, text, LIGHTHOUSE, negative="")
    latent = graph.node("EmptySD3LatentImage")
    graph.group("Draw")
    sigmas = schedule(graph, preset)
    drawn = sample(
        graph,
        preset,
        load["MODEL"],
        words,
        latent["LATENT"],
        sigmas,
        **skipping(preset.skip_layers),
    )
    graph.group("Look")
    picture = graph.node("VAEDecode", samples=drawn["LATENT"], vae=load["VAE"])
    graph.node("SaveImage", images=picture["IMAGE"], filename_prefix=f"sd3/{graph.name}")


# Teaching


NAMED, NEW_WORD = "three small pink rings on a black background", "zog"
OTHERS = "a large blue square on a white background"
ROUND = "two red circles on a white background"


def draw(
    graph: Graph,
    load: Node,
    prompt: str | Output,
    count: int = 1,
    model: Output | None = None,
    seed: int | Output = SEED,
    cfg: float = TINY.cfg,
) -> Output:
    """Pictures of a prompt, not saved.  model: the loaded one where none is given."""
    words = encode(graph, load, prompt, negative="")
    latent = graph.node("SD3EmptyLatent", model=load["MODEL"], batch_size=count)
    sigmas = schedule(graph, TINY)
    model = load["MODEL"] if model is None else model
    drawn = sample(graph, TINY, model, words, latent["LATENT"], sigmas, seed, cfg=cfg)
    picture = graph.node("SD3VAEDecode", samples=drawn["LATENT"], vae=load["VAE"])
    return picture["IMAGE"]


def drawn_set(graph: Graph, load: Node, prompt: str, caption: str, repeats: int = 1) -> Output:
    """Eight pictures that the model draws, under one caption."""
    return graph.node(
        "SD3TrainingImages",
        clip=load["CLIP"],
        vae=load["VAE"],
        folder="",
        repeats=repeats,
        images=draw(graph, load, prompt, count=8),
        captions=caption,
    )["dataset"]


def taught(graph: Graph, load: Node) -> Node:
    """SD3 Train LoRA on pictures that the model draws itself, under a new word."""
    graph.group("Pictures to learn from")
    dataset = drawn_set(graph, load, NAMED, NEW_WORD, repeats=3)
    graph.group("Pictures whose look is to stay")
    prior = drawn_set(graph, load, OTHERS, OTHERS)
    graph.group("Teach")
    density = graph.node("SD3TimestepDensity")
    return graph.node(
        "SD3TrainLoRA",
        model=load["MODEL"],
        dataset=dataset,
        prior=prior,
        density=density["density"],
        run_name=f"teach-{NEW_WORD}",
        steps=80,
        learning_rate=1e-3,
        rank=8,
        batch_size=4,
        warmup=10,
        validate_every=0,
        gradient_checkpointing=False,
        sample_prompt=NEW_WORD,
    )


@workflow("train-lora")
def train_lora(graph: Graph) -> None:
    """
    **Teach a LoRA, in minutes, without a picture of your own.** The built-in model draws eight
    pictures and learns to draw them for a word that it has never read, *zog*. *Run* again goes on
    where it stopped, more `steps` extend the run, and interrupting saves it. Eight other pictures
    (`prior`) hold it to what it drew before.

    *Your own pictures:* put them into a folder in ComfyUI's `input`, with NAME.txt beside NAME.png,
    name the folder in *SD3 Training Images* and remove its pictures' link.

    *SD3.5 instead of the built-in model:* choose its file in *SD3 Load Checkpoint*, a run_name of
    its own, learning_rate 0.0001, rank 16, about 1500 steps.
    """
    load = load_built_in(graph)
    train = taught(graph, load)
    graph.group("Keep and look")
    graph.node("SD3SaveLoRA", lora=train["lora"], filename_prefix=f"loras/{NEW_WORD}")
    graph.node("LossGraphNode", loss=train["loss"])
    graph.node("SaveImage", images=train["samples"], filename_prefix=f"sd3/{graph.name}")


@workflow("before-after")
def before_after(graph: Graph) -> None:
    """
    **The same prompt and seed, before and after training.** It shares its run with the workflow
    *train-lora*: if that has run, nothing is trained again. If you raised `steps` there, give the
    same number here.
    """
    load = load_built_in(graph)
    train = taught(graph, load)
    for title, model in (("Before", load["MODEL"]), ("After", train["MODEL"])):
        graph.group(title)
        picture = draw(graph, load, NEW_WORD, model=model, seed=SEED + 2)
        prefix = f"sd3/{graph.name}-{title.lower()}"
        graph.node("SaveImage", images=picture, filename_prefix=prefix)


@workflow("train-dpo")
def train_dpo(graph: Graph) -> None:
    """
    **Teach a LoRA a preference (Diffusion-DPO).** Here the preference is made, so that the workflow
    runs as it is: pictures drawn at `cfg` 3 go before those drawn at `cfg` 1. The loss begins at
    0.693, and the run ends with a sentence if the preferred pictures get worse too. Behind it *SD3
    Pick* compares the model before and after, picture by picture; the built-in model's checker
    votes. Thirty steps on four pairs change little.

    *Your own taste:* collect and pick pictures with the workflow *pick*, write `sd3_picks/my-picks`
    into `folder` of *SD3 Preferences* and remove the links of its pictures. A hundred prompts are a
    beginning. For SD3.5: learning_rate 0.00005, rank 32, 500 steps, `accumulation` 16, and *me* as
    `judge`: then you vote, blindly.
    """
    load = load_built_in(graph)
    graph.group("Preferred")
    chosen = draw(graph, load, ROUND, count=4)
    graph.group("Not preferred")
    rejected = draw(graph, load, ROUND, count=4, cfg=1.0)
    graph.group("Teach")
    preferences = graph.node(
        "SD3Preferences",
        clip=load["CLIP"],
        vae=load["VAE"],
        folder="",
        chosen=chosen,
        rejected=rejected,
        captions=ROUND,
    )
    train = graph.node(
        "SD3TrainDPO",
        model=load["MODEL"],
        dataset=preferences["preferences"],
        run_name="prefer-guided",
        steps=30,
        learning_rate=2e-4,
        rank=8,
        batch_size=2,
        warmup=10,
        validate_every=5,
        gradient_checkpointing=False,
    )
    graph.group("Keep and look")
    graph.node("SD3SaveLoRA", lora=train["lora"], filename_prefix="loras/prefer-guided")
    graph.node("LossGraphNode", loss=train["loss"])
    graph.group("Compare")
    before = draw(graph, load, ROUND, count=8, seed=SEED + 1)
    after = draw(graph, load, ROUND, count=8, seed=SEED + 1, model=train["MODEL"])
    graph.node(  # no SaveImage behind it, as in blind-comparison
        "SD3Pick",
        images=before,
        pick_name="prefer-guided",
        prompt=ROUND,
        images_b=after,
        label_a="before",
        label_b="after",
        seed=SEED + 1,
        model=load["MODEL"],
        judge="checker",
        model_b=train["MODEL"],
    )


def prompt_and_seed(graph: Graph) -> tuple[Output, Output]:
    """For all that draw and for the picks, which must not store another prompt than was drawn.

    The seed counts on: chosen by chance, PrimitiveInt's would be negative every other time.
    """
    graph.group("Say what to draw")
    prompt = graph.node("PrimitiveStringMultiline", title="Prompt", value=ROUND)
    seed = graph.node("PrimitiveInt", title="Seed", after_run="increment", value=SEED)
    return prompt["STRING"], seed["INT"]


@workflow("pick")
def pick(graph: Graph) -> None:
    """
    **Draw now, pick whenever you like.** Each run adds four pictures to the backlog of *SD3 Pick*;
    the seed counts on by itself, and the prompt is written in one place. Click the best and then
    the worst; *tie*, *skip* and *undo* are there too. The queue never waits: let it draw a hundred
    times overnight and pick in the morning.

    The picks lie in `output/sd3_picks/my-picks`, ready for *SD3 Preferences* (workflow
    *train-dpo*).
    """
    load = load_built_in(graph)
    prompt, seed = prompt_and_seed(graph)
    graph.group("Draw four")
    pictures = draw(graph, load, prompt, count=4, seed=seed)
    graph.group("Pick")
    picked = graph.node(
        "SD3Pick",
        images=pictures,
        pick_name="my-picks",
        prompt=prompt,
        seed=seed,
        model=load["MODEL"],
    )
    graph.node("SaveImage", images=picked["IMAGE"], filename_prefix=f"sd3/{graph.name}")


@workflow("blind-comparison")
def blind_comparison(graph: Graph) -> None:
    """
    **Which of two settings is better?** The same prompt and seeds at `cfg` 3 and at `cfg` 1, side
    by side, in an order that you cannot know. *SD3 Pick* counts the votes, with the 95 % interval
    and how many more votes are needed. Run again for more pairs: the seed counts on by itself, and
    prompt and seed are written in one place for both sides.

    Anything may be compared: another model, a LoRA, another sampler. The votes are pairs for
    *SD3 Preferences* as well.
    """
    load = load_built_in(graph)
    prompt, seed = prompt_and_seed(graph)
    graph.group("One setting")
    first = draw(graph, load, prompt, count=4, seed=seed)
    graph.group("The other")
    second = draw(graph, load, prompt, count=4, seed=seed, cfg=1.0)
    graph.group("Vote")
    graph.node(  # no SaveImage behind it: that would show which side is which
        "SD3Pick",
        images=first,
        pick_name="cfg-3-or-1",
        prompt=prompt,
        images_b=second,
        label_a="cfg 3",
        label_b="cfg 1",
        seed=seed,
        model=load["MODEL"],
    )
