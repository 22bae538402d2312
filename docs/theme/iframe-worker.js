// Pages that are opened from the file system may not start workers. This stands in for one, for the search: the worker's
// script runs in a hidden frame, and messages go to and fro as they would to a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<script>
        var importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done, failed) => {
          const script = Object.assign(document.createElement("script"), { src: url, onload: done, onerror: failed });
          document.body.appendChild(script);
        })), Promise.resolve());
        var postMessage = (data) => parent.dispatchEvent(new MessageEvent("worker-of-" + name, { data }));
      <` + `/script><body><script src="${new URL(url, location.href)}"><` + `/script></body>`;
      frame.name = String(Math.random()).slice(2);
      frame.onload = () => {
        this.frame = frame.contentWindow;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      };
      addEventListener("worker-of-" + frame.name, ({ data }) => {
        const event = new MessageEvent("message", { data });
        if (this.onmessage) this.onmessage(event);
        this.dispatchEvent(event);
      });
      document.body.appendChild(frame);
    }
    postMessage(data) {
      if (this.frame) this.frame.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
    terminate() {}
  };
}
