"use strict";
const media = JSON.parse(document.getElementById("media").textContent);
const urls = new Map();

function url(index) {
  if (!urls.has(index)) {
    const bytes = Uint8Array.from(atob(media[index].data), (c) => c.charCodeAt(0));
    urls.set(index, URL.createObjectURL(new Blob([bytes], { type: media[index].type })));
  }
  return urls.get(index);
}

function element(index, alt) {
  const video = media[index].type.startsWith("video/");
  const node = document.createElement(video ? "video" : "img");
  if (video) Object.assign(node, { muted: true, playsInline: true, preload: "auto" });
  if (video) node.setAttribute("aria-label", alt);
  else Object.assign(node, { alt, draggable: false });
  node.src = url(index);
  return node;
}

function fill(select, options, selected) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => String(value) === selected)) select.value = selected;
}

// The uncached video follows the time of the method's video, and both loop together.
function synchronise(leader, follower, button) {
  const follow = () => {
    if (Math.abs(follower.currentTime - leader.currentTime) > 0.04) follower.currentTime = leader.currentTime;
  };
  const play = () => Promise.all([leader.play(), follower.play()]).catch(() => {});
  leader.ontimeupdate = leader.onseeked = follow;
  leader.onplay = () => { button.textContent = "Pause"; };
  leader.onpause = () => { follower.pause(); button.textContent = "Play"; };
  leader.onended = () => { leader.currentTime = follower.currentTime = 0; play(); };
  button.onclick = () => (leader.paused ? play() : leader.pause());
  button.textContent = "Play";
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
}

function compare(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const find = (name) => root.querySelector("." + name);
  const [prompt, method, run, stage, slider, button] = ["prompt", "method", "run", "stage", "slider", "play"].map(find);
  const chosen = () => data.methods[method.value].runs[run.value];

  function slide() {
    stage.style.setProperty("--at", slider.value + "%");
  }
  function show() {
    const index = chosen().samples[prompt.value], text = data.prompts[prompt.value];
    const cached = element(index, `${data.methods[method.value].name}: ${text}`);
    const uncached = element(data.uncached[prompt.value], `uncached: ${text}`);
    uncached.className = "uncached";
    stage.replaceChildren(cached, uncached);
    cached.onload = cached.onloadedmetadata = () =>
      stage.classList.toggle("small", (cached.naturalWidth || cached.videoWidth) < 256);
    button.hidden = cached.tagName !== "VIDEO";
    if (!button.hidden) synchronise(cached, uncached, button);
    find("named").textContent = `${data.methods[method.value].name}, ${chosen().name} ▶`;
  }
  function choosePrompt() {
    const numbers = Object.keys(chosen().samples);
    fill(prompt, numbers.map((number) => [number, data.prompts[number]]), prompt.value);
    show();
  }
  function chooseMethod() {
    fill(run, data.methods[method.value].runs.map((r, number) => [number, r.name]), run.value);
    choosePrompt();
  }
  fill(method, data.methods.map((m, number) => [number, m.name + (m.ours ? " (ours)" : "")]), "0");
  method.onchange = chooseMethod;
  run.onchange = choosePrompt;
  prompt.onchange = show;
  slider.oninput = slide;
  find("difference").onchange = (event) => stage.classList.toggle("difference", event.target.checked);
  stage.onpointerdown = stage.onpointermove = (event) => {
    if (!event.buttons) return;
    const box = stage.getBoundingClientRect();
    slider.value = (100 * (event.clientX - box.left)) / box.width;
    slide();
  };
  slide();
  chooseMethod();
}

document.querySelectorAll(".compare").forEach(compare);
