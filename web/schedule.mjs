// The curve of SD3 Shift Schedule follows its widgets: Python is asked after every change.

import { api } from "/scripts/api.js";

const ADDRESS = "/sd3_workbench/schedule";
const ASKED = ["steps", "shift", "scheduler", "denoise"];
const WATCHED = [...ASKED, "auto_shift"];
const PAUSE = 80; // milliseconds: a dragged slider asks a few times a second

// Draws on the view now and whenever a widget changes.  Returns a function that asks once more.
export function followWidgets(node, view) {
  let waiting;
  let latest = 0;
  const ask = async (query) => {
    const mine = ++latest;
    const answer = await api.fetchApi(`${ADDRESS}?${new URLSearchParams(query)}`);
    // Overtaken by a later question, or values no node would take: the curve stays as it is.
    if (mine === latest && answer.ok) view.show(await answer.json());
  };
  const refresh = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const query = settings(node);
      if (!query) return;
      view.element.dataset.filled = "yes";
      ask(query);
    }, PAUSE);
  };
  for (const widget of node.widgets.filter(({ name }) => WATCHED.includes(name))) {
    const changed = widget.callback;
    widget.callback = function (...change) {
      const result = changed?.apply(this, change);
      if (settings(node)) refresh();
      else view.clear();
      return result;
    };
  }
  refresh();
  return refresh;
}

// The widgets' values, or null where only a run can tell: a linked value, the size of a latent.
function settings(node) {
  const linked = node.inputs?.some(({ widget, link }) => WATCHED.includes(widget?.name) && link != null);
  const values = Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]));
  if (linked || values.auto_shift) return null;
  return Object.fromEntries(ASKED.map((name) => [name, values[name]]));
}
