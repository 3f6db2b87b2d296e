// What scrolls sideways can be reached and moved by keyboard, a bar that opens code is called what is written on it, and
// the literature is a list of items to a screen reader as it is to the eye.

function reach() {
  document.querySelectorAll("summary[aria-label]").forEach((bar) => bar.removeAttribute("aria-label"));
  document.querySelectorAll("[role=list] > .citation").forEach((entry) => entry.setAttribute("role", "listitem"));
  for (const box of document.querySelectorAll("article :is(div, pre, figure, section)")) {
    const overflows = box.scrollWidth > box.clientWidth + 1;
    if (overflows && ["auto", "scroll"].includes(getComputedStyle(box).overflowX)) box.tabIndex = 0;
    else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  }
}

addEventListener("load", reach);
addEventListener("resize", reach);
