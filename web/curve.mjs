// The schedule of a run: noise level sigma and log-SNR over the steps, as Python computed them.

import { element } from "./panel.mjs";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 100; // of the drawing's own units; the browser stretches them
const HEIGHT = 100;
const BORDER = 4;
const MIN_HEIGHT = 104; // pixels
const MOST_DOTS = 64;

export function makeCurve() {
  const box = element("div", "sd3-report sd3-schedule");
  const caption = element("div", "sd3-caption");
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" });
  box.append(caption, drawing);
  box.style.minHeight = `${MIN_HEIGHT}px`;
  let shown = null;
  const rest = () => shown && caption.replaceChildren(...summary(shown));
  drawing.addEventListener("pointermove", (event) => {
    if (shown) caption.replaceChildren(...reading(shown, stepUnder(event, drawing, shown)));
  });
  drawing.addEventListener("pointerleave", rest);
  const view = {
    element: box,
    minHeight: MIN_HEIGHT,
    minWidth: 270,
    show(report) {
      shown = report;
      box.classList.remove("sd3-empty");
      drawing.replaceChildren(...drawn(report));
      rest();
    },
    clear() {
      shown = null;
      box.classList.add("sd3-empty");
      drawing.replaceChildren();
      caption.textContent = "After a run: sigma and log-SNR of every step";
    },
  };
  view.clear();
  return view;
}

function drawn({ sigmas, log_snr: logSnr }) {
  // Pure noise and no noise, the ends of a run, have no finite log-SNR: its curve leaves them out.
  const finite = logSnr.map((value, step) => (sigmas[step] > 0 && sigmas[step] < 1 ? value : null));
  const values = finite.filter((value) => value !== null);
  return [
    curve("sd3-log-snr", finite, Math.min(...values), Math.max(...values)),
    curve("sd3-sigma", sigmas, 0, 1),
    dots(sigmas),
  ];
}

function curve(className, values, low, high) {
  const points = values.map((value, step) => point(step, value, values.length, low, high));
  const drawn = points.filter((_, step) => values[step] !== null);
  return svg("path", { class: className, d: drawn.length ? `M${drawn.join("L")}` : "" });
}

function dots(sigmas) {
  const few = sigmas.length <= MOST_DOTS ? sigmas : [];
  const places = few.map((sigma, step) => `M${point(step, sigma, few.length, 0, 1)}h0`);
  return svg("path", { class: "sd3-sigma sd3-dots", d: places.join("") });
}

function point(step, value, count, low, high) {
  const part = Math.min(1, Math.max(0, (value - low) / (high - low || 1)));
  const x = BORDER + (step / Math.max(1, count - 1)) * (WIDTH - 2 * BORDER);
  const y = HEIGHT - BORDER - part * (HEIGHT - 2 * BORDER);
  return `${x.toFixed(2)} ${y.toFixed(2)}`;
}

function stepUnder(event, drawing, { sigmas }) {
  const { left, width } = drawing.getBoundingClientRect();
  const part = (((event.clientX - left) / width) * WIDTH - BORDER) / (WIDTH - 2 * BORDER);
  return Math.round(Math.min(1, Math.max(0, part)) * (sigmas.length - 1));
}

function summary({ shift, sigmas }) {
  return [
    element("span", "", `${sigmas.length - 1} steps, shift ${round(shift)}`),
    element("span", "sd3-sigma", "sigma"),
    element("span", "sd3-log-snr", "log-SNR"),
  ];
}

function reading({ sigmas, log_snr: logSnr }, step) {
  return [
    element("span", "", step < sigmas.length - 1 ? `step ${step + 1}` : "end"),
    element("span", "sd3-sigma", `sigma ${sigmas[step].toFixed(4)}`),
    element("span", "sd3-log-snr", `log-SNR ${signed(sigmas[step], logSnr[step])}`),
  ];
}

const round = (value) => Number(value.toFixed(4));

function signed(sigma, value) {
  if (sigma >= 1) return "−∞";
  if (sigma <= 0) return "+∞";
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}

function svg(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
