/* Search without a server: browsers start no worker from file://, so there a hidden frame stands in for one. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #waiting = [];
    #frame = document.createElement("iframe");

    constructor(url) {
      super();
      this.#frame.hidden = true;
      document.body.append(this.#frame);
      const inside = this.#frame.contentWindow;
      const load = (source) =>
        new Promise((resolve, reject) => {
          const script = inside.document.createElement("script");
          script.src = source;
          script.onload = resolve;
          script.onerror = reject;
          inside.document.body.append(script);
        });
      inside.importScripts = (...urls) =>
        urls.reduce((loaded, each) => loaded.then(() => load(each)), Promise.resolve());
      inside.postMessage = (data) => setTimeout(() => this.#tell(this, data));
      load(new URL(url, location.href).href).then(() => {
        for (const data of this.#waiting) this.#tell(inside, data);
        this.#waiting = null;
      });
    }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data);
      else this.#tell(this.#frame.contentWindow, data);
    }

    terminate() {
      this.#frame.remove();
    }

    #tell(target, data) {
      const event = new MessageEvent("message", { data });
      target.dispatchEvent(event);
      target.onmessage?.(event);
    }
  };
}
