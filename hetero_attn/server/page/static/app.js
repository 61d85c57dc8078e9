"use strict";
// The page: a conversation, and beside it what the lanes do. Text of a model or a server only ever becomes textContent.

const $ = id => document.getElementById(id);
let talk = [];
let asking = null; // AbortController of the answer that streams
let lastPhases = null;
let curve = [];

function make(name, className, text) {
  const found = document.createElement(name);
  if (className) found.className = className;
  if (text !== undefined) found.textContent = text;
  return found;
}

async function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  if (answer.status === 401) $("access").open = true;
  throw new Error(told.error?.message ?? told.error ?? `the server answers ${answer.status}`);
}

// Chat

function show(role, text) {
  const item = make("li", role);
  const words = make("span", "", text);
  item.append(words);
  $("messages").append(item);
  item.scrollIntoView({ block: "nearest" });
  return { item, words };
}

function setAsking(controller) {
  asking = controller;
  $("send").disabled = controller !== null;
  $("stop").disabled = controller === null;
}

async function answer() {
  const own = talk, { item, words } = show("assistant", "");
  let thought = null, tokens = 0, begin = 0;
  setAsking(new AbortController());
  try {
    const body = { messages: own, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    const reply = await ask("/v1/chat/completions", body, asking.signal);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader(), events = new EventReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      for (const event of events.feed(part.value)) {
        if (event.ping) { $("speed").textContent = `prompt ${event.ping[0]} of ${event.ping[1]} tokens`; continue; }
        if (event.error) throw new Error(event.error.message);
        const delta = event.choices[0]?.delta ?? {};
        if (delta.reasoning_content) {
          if (!thought) item.prepend(thought = make("span", "thought", ""));
          thought.textContent += delta.reasoning_content;
        }
        if (delta.content) words.textContent += delta.content;
        if (event.usage) {
          begin = begin || performance.now();
          tokens = event.usage.completion_tokens;
          const reused = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
          const speed = rate((tokens - 1) / ((performance.now() - begin) / 1000));
          $("speed").textContent = `${speed}, ${event.usage.prompt_tokens} of prompt (${reused} reused), ${tokens} of answer`;
        }
      }
      item.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name !== "AbortError" && own === talk) show("error", error.message);
  } finally {
    own.push({ role: "assistant", content: words.textContent });
    setAsking(null);
    $("words").focus();
  }
}

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  const text = $("words").value.trim();
  if (!text || asking) return;
  talk.push({ role: "user", content: text });
  show("user", text);
  $("words").value = "";
  answer();
});
$("words").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
  if (event.key === "Escape" && asking) asking.abort();
});
$("stop").addEventListener("click", () => asking?.abort());
$("clear").addEventListener("click", () => { asking?.abort(); talk = []; $("messages").replaceChildren(); });
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); look(); });

// What the model does

function bar(name, value, shares) {
  const found = make("div", "bar"), head = make("span"), track = make("div", "track");
  head.append(make("b", "", name), make("span", "", value));
  for (const share of shares) {
    const part = make("i");
    part.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
    track.append(part);
  }
  found.append(head, track);
  return found;
}

function showRates(report, spent) {
  const rows = ["prefill", "decode"].map(phase => {
    const row = make("tr"), now = spent[phase] ?? report.phases[phase];
    const name = phase === "prefill" ? "prompt" : "answer";
    row.append(make("th", "", name), make("td", "", rate(report.predicted?.[phase])), make("td", "", rate(now.tokens / now.wall_s)));
    return row;
  });
  $("rates").tBodies[0].replaceChildren(...rows);
}

function showLanes(spent) {
  const found = [];
  for (const [phase, now] of Object.entries(spent)) {
    if (!now) continue;
    const name = phase === "prefill" ? "prompt" : "answer", part = seconds => seconds / now.wall_s;
    const told = share => `${Math.round(share * 100)} %`;
    found.push(bar(`${name}: CPU lane at work`, told(part(now.cpu_lane_s)), [part(now.cpu_lane_s)]));
    found.push(bar(`${name}: waiting for it`, told(part(now.waited_s)), [part(now.waited_s)]));
    found.push(bar(`${name}: hand-overs`, told(part(now.handover_s)), [part(now.handover_s)]));
    if (now.streamed_bytes) found.push(make("div", "bar", `${name}: ${bytes(now.streamed_bytes / now.wall_s)}/s over PCIe`));
  }
  if (found.length) $("lanes").replaceChildren(...found);
}

function showMemory(memory) {
  const found = [], names = { gpu: "GPU", pinned: "page-locked DRAM", host: "DRAM" };
  for (const [place, kinds] of Object.entries(memory)) {
    const all = Object.entries(kinds).filter(([, count]) => count > 0).sort((a, b) => b[1] - a[1]);
    const total = all.reduce((sum, [, count]) => sum + count, 0);
    if (!total) continue;
    found.push(bar(names[place] ?? place, bytes(total), all.map(([, count]) => count / total)));
    found.push(make("div", "bar", all.map(([kind, count]) => `${kind} ${bytes(count)}`).join(", ")));
  }
  $("memory").replaceChildren(...found);
}

function showFills(report) {
  const used = Math.round(report.cache_used * report.cache_tokens), longest = report.longest_context;
  $("fills").replaceChildren(
    bar("cache", `${used} of ${report.cache_tokens} tokens`, [report.cache_used]),
    bar("longest context", `${longest} of ${report.max_context}`, [longest / report.max_context]),
    bar("places", `${report.running} of ${report.max_batch}, ${report.waiting} wait`, [report.running / report.max_batch]),
  );
}

async function look() {
  try {
    const report = await (await ask("/hetero/report")).json();
    const spent = between(lastPhases, report.phases);
    lastPhases = report.phases;
    $("model").textContent = document.title = report.model;
    $("state").textContent = `${report.device}, ${report.state}`;
    showRates(report, spent);
    showLanes(spent);
    showFills(report);
    showMemory(report.memory);
    if (report.gpu_memory_bytes && $("budget").hidden) await openBudget(report);
  } catch (error) {
    $("state").textContent = error.message;
  }
}

// GPU memory

async function openBudget(report) {
  $("budget").hidden = false;
  curve = (await (await ask("/hetero/plan")).json()).curve;
  const now = curve.findIndex(point => point.gpu_memory_bytes >= report.gpu_memory_bytes);
  $("gpu").max = curve.length - 1;
  $("gpu").value = now < 0 ? curve.length - 1 : now;
  $("apply").hidden = !report.elastic;
  $("told").textContent = report.elastic ? "" : "not elastic: what is shown is for the next start, as --gpu-memory";
  drawCurve();
}

function drawCurve() {
  const most = Math.max(...curve.map(point => point.decode_tokens_per_s ?? 0)) || 1, last = Math.max(1, curve.length - 1);
  const at = (place, speed) => [place / last * 280 + 10, 105 - (speed ?? 0) / most * 95];
  const make = (name, fields) => {
    const found = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(fields)) found.setAttribute(key, value);
    return found;
  };
  const known = curve.map((point, place) => [place, point.decode_tokens_per_s]).filter(([, speed]) => speed !== null);
  const chosen = Number($("gpu").value), point = curve[chosen], [x, y] = at(chosen, point.decode_tokens_per_s);
  const line = make("polyline", { points: known.map(([place, speed]) => at(place, speed).join(",")).join(" ") });
  $("curve").replaceChildren(line, make("line", { x1: x, x2: x, y1: 5, y2: 105 }), make("circle", { cx: x, cy: y, r: 4 }));
  const speed = point.decode_tokens_per_s === null ? point.why : rate(point.decode_tokens_per_s);
  $("wish").textContent = `${bytes(point.gpu_memory_bytes)}: ${speed}`;
  $("gpu").setAttribute("aria-valuetext", $("wish").textContent);
  $("apply").disabled = point.decode_tokens_per_s === null;
}

$("gpu").addEventListener("input", drawCurve);
$("apply").addEventListener("click", async () => {
  $("apply").disabled = true;
  $("told").textContent = "moving weights";
  try {
    const done = await (await ask("/hetero/resize", { gpu_memory_bytes: curve[$("gpu").value].gpu_memory_bytes })).json();
    $("told").textContent = `now ${bytes(done.gpu_memory_bytes)}`;
  } catch (error) {
    $("told").textContent = error.message;
  }
  $("apply").disabled = false;
  look();
});

look();
setInterval(look, 1000);
