"use strict";
// What server-sent events and reports mean; nothing here touches the page.

// Cuts a stream of text into the data of its events; comments are told as {ping: [done, of]}.
class EventReader {
  constructor() { this.held = ""; }
  feed(text) {
    const frames = (this.held + text).split("\n\n");
    this.held = frames.pop();
    const found = [];
    for (const frame of frames) {
      const ping = /^: ping (\d+)\/(\d+)$/.exec(frame);
      if (ping) found.push({ ping: [Number(ping[1]), Number(ping[2])] });
      const data = frame.split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") found.push(JSON.parse(data));
    }
    return found;
  }
}

function bytes(count) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (count >= size) return `${(count / size).toPrecision(3)} ${unit}`;
  }
  return `${count} B`;
}

function rate(value) {
  if (!(value > 0) || !Number.isFinite(value)) return "-";
  return `${value < 100 ? value.toPrecision(3) : Math.round(value)} tokens/s`;
}

// What happened between two reports, by phase; null where nothing did.
function between(before, after) {
  const found = {};
  for (const phase of Object.keys(after)) {
    const spent = {};
    for (const [name, value] of Object.entries(after[phase])) spent[name] = value - (before?.[phase]?.[name] ?? 0);
    found[phase] = spent.steps > 0 && spent.wall_s > 0 ? spent : null;
  }
  return found;
}
