// SD3 Pick: the next candidates of the backlog, to be picked by a click.
//
// The server says which group is next, in which order its pictures stand and what the votes say;
// a click is sent, and the answer is the next group.

import { api } from "/scripts/api.js";
import { app } from "/scripts/app.js";

const NODE = "SD3Pick";
const MIN_HEIGHT = 260;
const MIN_WIDTH = 420;
const CONFLICT = 409; // a vote that is refused

app.registerExtension({
  name: "SD3Workbench.Pick",

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    let told = ""; // the name that the last run used, where a link brings it
    const view = makeView(() => (isLinked(node) && told) || (nameWidget(node)?.value ?? ""));
    const widget = node.addDOMWidget("sd3_pick", "sd3_workbench_pick", view.element, {
      serialize: false,
      getMinHeight: () => MIN_HEIGHT,
      getValue: () => undefined,
    });
    widget.serialize = false;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      told = output?.sd3_report?.[0]?.pick_name ?? "";
      view.refresh();
    };
    const name = nameWidget(node);
    const changed = name?.callback;
    if (name) {
      name.callback = function (...values) {
        changed?.apply(this, values);
        view.refresh();
      };
    }
    node.sd3Refresh = view.refresh;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width, MIN_WIDTH), Math.max(node.size[1], height)]);
    setTimeout(view.refresh, 0); // when a saved workflow has filled the widgets
  },

  loadedGraphNode(node) {
    node.sd3Refresh?.();
  },
});

const nameWidget = (node) => node.widgets?.find(({ name }) => name === "pick_name");
const isLinked = (node) => node.inputs?.some(({ name, link }) => name === "pick_name" && link != null);

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function makeView(pickName) {
  const whole = element("div", "sd3-report sd3-pick");
  const head = element("div", "sd3-caption");
  const prompt = element("div", "sd3-value");
  const pictures = element("div", "sd3-pictures");
  const buttons = element("div", "sd3-buttons");
  const said = element("div", "sd3-value");
  whole.append(head, prompt, pictures, buttons, said);

  let latest = null; // the state on screen
  let group = null;
  let best = "";
  let asked = 0; // an answer that came late must not replace a newer one
  let voting = false; // until the answer the group on screen may be decided already
  let stale = false; // something happened meanwhile

  async function talk(vote, reveal = false) {
    const name = pickName();
    if (!name.trim()) {
      said.textContent = "Give pick_name a name.";
      return;
    }
    const turn = ++asked;
    const options = vote && {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(vote),
    };
    const address = `/sd3_workbench/picks/${encodeURIComponent(name)}${reveal ? "?reveal=1" : ""}`;
    let answer;
    let told;
    try {
      answer = await api.fetchApi(address, options);
      told = await answer.json();
    } catch (error) {
      const status = answer ? `says ${answer.status} ${answer.statusText}` : "does not answer";
      said.textContent = `The server ${status} (${error.message}).`;
      return;
    }
    if (turn !== asked) return;
    if (answer.ok) {
      show(told);
      return;
    }
    if (vote && answer.status === CONFLICT) await talk(); // decided elsewhere, in another window
    said.textContent = told.error;
  }

  async function send(...what) {
    if (voting) return;
    voting = true;
    try {
      stale = false;
      await talk(...what);
    } finally {
      voting = false;
    }
    if (stale) await talk();
  }

  function refresh() {
    if (voting) stale = true;
    else talk();
  }

  // The same group again, as when a run ends between two clicks, keeps its best.
  function show(state) {
    const moved = state.subfolder !== latest?.subfolder;
    latest = state;
    if (moved || state.group?.id !== group?.id) {
      group = state.group;
      best = "";
      const shown = (group?.pictures ?? []).map((name) => picture(name, state.subfolder));
      pictures.replaceChildren(...shown);
    }
    const nothing = state.decided ? "Everything is picked." : "Run to collect pictures.";
    prompt.textContent = group ? group.prompt : nothing;
    head.replaceChildren(
      element("span", "", `${state.open} to pick`),
      element("span", "sd3-label", `${state.decided} done`),
    );
    buttons.replaceChildren();
    if (best) buttons.append(button("no worst", { group: group.id, best }));
    if (group) {
      buttons.append(button("tie", { group: group.id, verdict: "tie" }));
      buttons.append(button("skip", { group: group.id, verdict: "skip" }));
    }
    if (state.decided) buttons.append(button("undo", { undo: true }));
    if (state.hidden) buttons.append(button("reveal", undefined, true));
    const told = state.comparison ? sentence(state.comparison, state.open) : "";
    said.textContent = [told, state.problem].filter(Boolean).join(" ");
  }

  function picture(name, subfolder) {
    const shown = element("img", "sd3-candidate");
    const query = new URLSearchParams({ filename: name, subfolder, type: "output" });
    shown.src = api.apiURL(`/view?${query}`);
    shown.draggable = false;
    shown.dataset.name = name;
    shown.title = titled("best");
    shown.addEventListener("click", ({ detail, shiftKey }) => {
      if (shiftKey) window.open(shown.src);
      else if (detail < 2) click(name); // the second of a double click judges nothing
    });
    return shown;
  }

  const titled = (which) => `Click the ${which} one; with Shift it opens in full size.`;

  function choose(name) {
    best = name;
    for (const shown of pictures.children) {
      shown.classList.toggle("sd3-best", shown.dataset.name === name);
      shown.title = titled(name ? "worst" : "best");
    }
    show(latest);
  }

  // Of two pictures one click decides; of more the second click names the worst.
  function click(name) {
    if (voting) return;
    if (group.pictures.length === 2) {
      send({ group: group.id, best: name });
    } else if (!best) {
      choose(name);
    } else if (best === name) {
      choose(""); // taken back
    } else {
      send({ group: group.id, best, worst: name });
    }
  }

  function button(text, ...what) {
    const made = element("button", "sd3-button", text);
    made.type = "button";
    made.addEventListener("click", ({ detail }) => {
      if (detail < 2) send(...what);
    });
    return made;
  }

  return { element: whole, refresh };
}

// waiting: pictures that were still to pick when it was revealed.
function sentence({ arms, wins, ties, rate, low, high, needed }, waiting) {
  const percent = (part) => `${Math.round(100 * part)} %`;
  const more = needed === null ? "" : needed ? `; about ${needed} more votes decide` : "; decided";
  const early = waiting
    ? `. Seen with ${waiting} to pick: if that ends the picking, the interval is too narrow`
    : "";
  return (
    `${arms[0]} wins ${percent(rate)} against ${arms[1]} ` +
    `(95 %: ${percent(low)} to ${percent(high)}; ${wins[0]} : ${wins[1]}, ${ties} ties)` +
    more + early
  );
}
