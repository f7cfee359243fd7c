// A node's report as a few lines of text: notes first, then what was used, then time and memory.

const TITLES = { mmdit: "MMDiT", vae: "VAE", clip_l: "CLIP-L", clip_g: "CLIP-G", t5: "T5" };
const LINE = 16; // pixels
const FRAME = 8; // the stylesheet's padding
// What is kept free before the first run, so that nodes do not grow into each other.
const LINES = { SD3EmptyLatent: 1, SD3VAEDecode: 2, SD3VAEEncode: 2, SD3EncodePrompt: 4, SD3Sample: 4, SD3Sweep: 12 };
const USUAL_LINES = 3;

const FAR = "of the latents from those of a run without approximations, relative";

const title = (kind) => TITLES[kind] ?? kind;
const plain = (key) => key.replaceAll("_", " ");

// What to write for a key of a report: lines of [label, text, hint].  A key without an entry is
// written as it is, so a new key shows before anyone thinks of its form.
const WRITERS = {
  notes: () => [],
  width: (width, report) => [["size", `${width} × ${report.height}${batch(report.batch_size)}`]],
  height: () => [],
  batch_size: () => [],
  positive: (words) => [["positive", tokens(words) + again(words)]],
  negative: (words) => [["negative", tokens(words) + again(words)]],
  window: () => [],
  use: (use, report) => [["encoders", encoders(use, report.loaded)]],
  loaded: () => [],
  sampler: (sampler, { sigmas, shift }) => [
    ["sampler", `${sampler}, ${sigmas.length - 1} steps, shift ${shift}`],
  ],
  shift: (shift, { sampler }) => (sampler ? [] : [["shift", shift]]),
  sigmas: () => [],
  sigma: () => [], // with pdf: a curve, which its node shows as a picture
  pdf: () => [],
  latent: () => [],
  dtype: () => [],
  guidance: guidanceLines,
  files: fileLines,
  lora: ({ file, fingerprint }) => [["LoRA", file, `fingerprint ${fingerprint}`]],
  loras: (loras) => loras.map((lora) => ["LoRA", `${lora.file} × ${lora.strength}`]),
  weights: (weights, report) => [["weights", `${weights}, computed in ${report.compute}`]],
  compute: () => [],
  matched: (matched, report) => [["layers", `${matched} matched, ${report.unmatched} not`]],
  unmatched: () => [],
  model_patches: () => [],
  clip_patches: () => [],
  unmatched_names: (names) => names.map((name) => ["no place for", name]),
  speed: speedLines,
  distance: (distance) => (distance === null ? [] : [["distance", brief(distance), FAR]]),
  varied: () => [],
  fixed: () => [],
  reference: () => [],
  cells: (cells, { reference }) => cells.map((cell) => cellLine(cell, cells[reference - 1].label)),
  seconds: (seconds, report) => [["took", time(seconds) + memory(report.peak_memory_mib)]],
  peak_memory_mib: () => [],
};

const batch = (size) => (size > 1 ? `, ${size} at a time` : "");
const time = (seconds) => (seconds < 120 ? `${seconds} s` : `${(seconds / 60).toFixed(1)} min`);
const memory = (mebibytes) => (mebibytes ? `, at most ${(mebibytes / 1024).toFixed(1)} GiB` : "");

function tokens({ tokens: counts }) {
  const read = Object.keys(TITLES).filter((kind) => kind in counts);
  if (read.every((kind) => counts[kind] === 0)) return "empty";
  return read.map((kind) => `${title(kind)} ${counts[kind]}`).join(", ") + " tokens";
}

const again = ({ known }) => (known ? ", kept from before" : "");

const encoders = (use, loaded) =>
  loaded.map((kind) => title(kind) + (use.includes(kind) ? "" : " (off)")).join(", ");

// One line a file, however many networks came from it.
function fileLines(files) {
  const kinds = {};
  for (const [kind, { file }] of Object.entries(files)) (kinds[file] ??= []).push(title(kind));
  const prints = Object.fromEntries(Object.values(files).map((f) => [f.file, f.fingerprint]));
  return Object.entries(kinds).map(([file, parts]) => [
    "file",
    `${file}: ${parts.join(", ")}`,
    `fingerprint ${prints[file]}`,
  ]);
}

// What a cell of SD3 Sweep cost and how it went.  reference: the cell it is compared with, in words.
function cellLine(cell, reference) {
  const { label, seconds, peak_memory_mib: peak, path_length: path, path_ratio: ratio } = cell;
  const judged = "right" in cell ? `, ${cell.right} of ${cell.pictures} right` : "";
  const value = `${time(seconds)}, path ${brief(path)} (× ${brief(ratio)})`;
  const far = label === reference ? "reference" : `distance ${brief(cell.distance)}`;
  const hint = `distance from ${reference}${memory(peak)}${cell.wrong ? `; wrong: ${cell.wrong}` : ""}`;
  return [label, `${value}, ${far}${judged}`, hint];
}

function guidanceLines({ cfg, span, skip_scale, skip_layers, skip_span }) {
  const part = ([start, end]) => (start <= 0 && end >= 1 ? "" : `, from ${start} to ${end}`);
  const lines = [["cfg", cfg + part(span)]];
  if (skip_scale) {
    lines.push(["skip layers", `${skip_layers.join(", ")} × ${skip_scale}${part(skip_span)}`]);
  }
  return lines;
}

// What made the run faster or smaller; why the rest did not, as a hint.
function speedLines(gains) {
  const told = (wanted) =>
    gains
      .filter(({ active }) => active === wanted)
      .map(({ name, note }) => (note ? `${name} (${note})` : name))
      .join(", ");
  return [["speed", told(true) || "nothing acted", told(false) && `not active: ${told(false)}`]];
}

function brief(value) {
  if (value === null || value === undefined) return "–";
  if (Array.isArray(value)) {
    return value.length > 8 ? `${value.length} values` : value.map(brief).join(", ");
  }
  if (typeof value === "object") {
    return Object.entries(value).map(([key, inner]) => `${plain(key)} ${brief(inner)}`).join(", ");
  }
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number" && !Number.isInteger(value)) {
    return String(Number(value.toPrecision(6)));
  }
  return String(value);
}

function lines(report) {
  const { files, ...rest } = report;
  return Object.entries(files ? { ...rest, files } : rest).flatMap(([key, value]) =>
    Object.hasOwn(WRITERS, key) ? WRITERS[key](value, report) : [[plain(key), brief(value)]],
  );
}

// The notes of the report and of its parts (positive, negative), each once.
function notes(report) {
  const parts = Object.values(report).filter((value) => Array.isArray(value?.notes));
  return new Set([report, ...parts].flatMap((part) => part.notes ?? []));
}

export function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text; // reports hold names of files, so never HTML
  return made;
}

export function makePanel(node) {
  const panel = element("div", "sd3-report sd3-empty", "After a run: what was used");
  const minHeight = (LINES[node.comfyClass] ?? USUAL_LINES) * LINE + FRAME;
  panel.style.minHeight = `${minHeight}px`;
  return { element: panel, minHeight, minWidth: node.comfyClass.startsWith("SD3Load") ? 340 : 240, show: (report) => fill(panel, report) };
}

function fill(panel, report) {
  const shown = [...notes(report)].map((note) => element("div", "sd3-note", note));
  const table = element("div", "sd3-lines");
  for (const [label, text, hint = ""] of lines(report)) {
    const value = element("span", "sd3-value", text);
    value.title = hint;
    table.append(element("span", "sd3-label", label), value);
  }
  panel.classList.remove("sd3-empty");
  panel.replaceChildren(...shown, table);
}
