/* Browsers start no workers from files that were opened without a server; there the search runs in a hidden frame. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true });
      document.body.appendChild(this.frame);
      this.inside = this.frame.contentWindow;
      this.inside.importScripts = (...urls) => urls.reduce((before, each) => before.then(() => this.load(each)), Promise.resolve());
      this.inside.postMessage = (data) => setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })));
      this.ready = this.load(url);
    }
    load(url) {
      const script = Object.assign(this.inside.document.createElement("script"), { src: url });
      this.inside.document.body.appendChild(script);
      return new Promise((done, failed) => Object.assign(script, { onload: done, onerror: failed }));
    }
    postMessage(data) {
      this.ready.then(() => setTimeout(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }))));
    }
  };
}
