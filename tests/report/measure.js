// Put at the end of a page: writes what a reader would stumble over into an element "measured", as JSON.
// A label is a piece of text that is drawn; its boxes are those of its lines, cut to the box that scrolls it.
window.addEventListener("load", () => {
  const labels = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility() || parent.closest("script, style, title")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const scroller = parent.closest("pre, .scroll")?.getBoundingClientRect();
    for (const box of range.getClientRects()) {
      const top = scroller ? Math.max(box.top, scroller.top) : box.top;
      const bottom = scroller ? Math.min(box.bottom, scroller.bottom) : box.bottom;
      if (box.width && bottom > top) labels.push({node, left: box.left, right: box.right, top, bottom});
    }
  }
  const slack = 1, overlaps = [], outside = [];
  labels.forEach((a, place) => {
    const drawing = a.node.parentElement.closest("svg")?.getBoundingClientRect();
    if (drawing && (a.left < drawing.left - slack || a.right > drawing.right + slack
        || a.top < drawing.top - slack || a.bottom > drawing.bottom + slack)) outside.push(a.node.data);
    for (const b of labels.slice(place + 1)) {
      if (a.node !== b.node && a.left < b.right - slack && b.left < a.right - slack
          && a.top < b.bottom - slack && b.top < a.bottom - slack) overlaps.push([a.node.data, b.node.data]);
    }
  });
  const background = getComputedStyle(document.body).backgroundColor;
  const tick = document.querySelector("svg text");
  const measured = {
    labels: labels.length, overlaps, outside, background,
    ink: tick ? getComputedStyle(tick).fill : "",
    too_wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    owned: window.owned === true,
  };
  const result = document.createElement("pre");
  result.id = "measured";
  result.textContent = JSON.stringify(measured);
  document.body.append(result);
});
