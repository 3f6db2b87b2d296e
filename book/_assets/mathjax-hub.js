// The widget manager typesets formulae in labels through MathJax 2's queue. The book has MathJax 3: this translates.
document.addEventListener("DOMContentLoaded", () => {
  if (window.MathJax && !window.MathJax.Hub) {
    window.MathJax.Hub = {
      Queue: ([, , element]) => window.MathJax.startup?.promise.then(() => window.MathJax.typesetPromise([element])),
    };
  }
});
