// Shows on every node of this pack what its last run reported (`sd3_report` in /history).
//
// Python computes and words everything; here it is only laid out, as DOM widgets, which both of
// ComfyUI's renderers can show.

import { api } from "/scripts/api.js";
import { app } from "/scripts/app.js";

import { makeCurve } from "./curve.mjs";
import { makePanel } from "./panel.mjs";
import { followWidgets } from "./schedule.mjs";

const REPORT = "sd3_report";
const WIDGET = "sd3_report";
const PACK_FOLDER = decodeURIComponent(new URL(".", import.meta.url).pathname.split("/").at(-2));
const MARGIN = 10; // that ComfyUI leaves around a DOM widget
const RUNS_LOOKED_AT = 16; // of /history, for the last run of the open workflow
const NO_ID = "00000000-0000-0000-0000-000000000000"; // of every workflow that came in API form

const ours = new Set(); // node ids of this pack
const DRAWN_ELSEWHERE = ["SD3Pick"]; // shows its own pictures and counts

app.registerExtension({
  name: "SD3Workbench.Reports",

  init() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./workbench.css", import.meta.url).href;
    document.head.append(style);
  },

  beforeRegisterNodeDef(_nodeType, definition) {
    const { name, python_module: module } = definition;
    if (module !== `custom_nodes.${PACK_FOLDER}` || DRAWN_ELSEWHERE.includes(name)) return;
    ours.add(name);
  },

  nodeCreated(node) {
    if (ours.has(node.comfyClass)) addReport(node);
  },

  loadedGraphNode(node) {
    findReport(node)?.refresh?.();
  },

  // A workflow opened from the history, or a tab that comes to the front again.
  onNodeOutputsUpdated(outputs) {
    showOutputs(outputs);
  },

  // The page was loaded anew: ComfyUI forgets outputs, its history does not.
  async afterConfigureGraph() {
    showOutputs(await lastOutputs(rootGraph()), (panel) => !panel.dataset.filled);
  },
});

function addReport(node) {
  const schedule = node.comfyClass === "SD3ShiftSchedule";
  const view = schedule ? makeCurve() : makePanel(node);
  const widget = node.addDOMWidget(WIDGET, "sd3_workbench_report", view.element, {
    serialize: false, // not part of the prompt
    getMinHeight: () => view.minHeight + 2 * MARGIN,
    getValue: () => undefined,
  });
  widget.serialize = false; // nor of the saved workflow
  widget.show = view.show;
  if (schedule) widget.refresh = followWidgets(node, view);
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.call(this, output);
    showOn(this, output);
  };
  letCanvasMove(view.element);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, view.minWidth), Math.max(node.size[1], height)]);
}

const rootGraph = () => app.rootGraph ?? app.graph;
const findReport = (node) => node?.widgets?.find(({ name }) => name === WIDGET);

function showOn(node, output, wanted = () => true) {
  const widget = findReport(node);
  const report = output?.[REPORT]?.[0];
  if (!widget?.show || !report || !wanted(widget.element)) return;
  widget.element.dataset.filled = "yes";
  widget.show(report);
  node.setDirtyCanvas(true, true);
}

function showOutputs(outputs, wanted) {
  for (const [id, output] of Object.entries(outputs)) {
    showOn(findNode(rootGraph(), id), output, wanted);
  }
}

// id: "5"; inside subgraphs "12:5" by the nodes on the way, or "<uuid of the subgraph>:5".
function findNode(graph, id) {
  const steps = String(id).split(":");
  const last = steps.pop();
  for (const step of steps) {
    graph = graph?.subgraphs?.get(step) ?? graph?.getNodeById(step)?.subgraph;
  }
  return graph?.getNodeById(last);
}

// What the newest run of this workflow left in the history; nothing where there is none.
async function lastOutputs(graph) {
  if (graph.id === NO_ID || !graph.nodes.some((node) => ours.has(node.comfyClass))) return {};
  const answer = await api.fetchApi(`/history?max_items=${RUNS_LOOKED_AT}`);
  if (!answer.ok) return {};
  const runs = Object.values(await answer.json()).sort((a, b) => b.prompt[0] - a.prompt[0]);
  return runs.find(({ prompt }) => isRunOf(graph, prompt))?.outputs ?? {};
}

// prompt: as in /history, [number, id, nodes, extra data, ...].
function isRunOf(graph, [, , nodes, extra]) {
  const sameKind = ([id, { class_type }]) => findNode(graph, id)?.comfyClass === class_type;
  return extra?.extra_pnginfo?.workflow?.id === graph.id && Object.entries(nodes).every(sameKind);
}

// The wheel turns the panel only where the panel has more to show; else, and with the middle button,
// the mouse moves the canvas.  Nodes 2.0 sees to that itself.
function letCanvasMove(element) {
  const forward = (type, wanted, method) =>
    element.addEventListener(type, (event) => {
      if (wanted(event) && !globalThis.LiteGraph?.vueNodesMode) app.canvas[method](event);
    });
  const scrolls = (event) => element.scrollHeight > element.clientHeight && !event.ctrlKey;
  element.addEventListener("wheel", (event) => scrolls(event) && event.stopPropagation());
  forward("wheel", (event) => !scrolls(event), "processMouseWheel");
  forward("pointerdown", ({ button }) => button === 1, "processMouseDown");
  forward("pointermove", ({ buttons }) => (buttons & 4) !== 0, "processMouseMove");
  forward("pointerup", ({ button }) => button === 1, "processMouseUp");
}
