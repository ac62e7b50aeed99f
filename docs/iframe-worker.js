// Search in pages that are opened from the disk: browsers start no worker there, so a hidden frame stands in for one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      const ready = new Promise(loaded => frame.addEventListener("load", loaded, { once: true }))
      frame.hidden = true
      frame.deliver = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const load = `postMessage = data => frameElement.deliver(data)
        importScripts = (...urls) => Promise.all(urls.map(src => new Promise(done =>
          document.head.append(Object.assign(document.createElement("script"), { src, onload: done })))))`
      frame.srcdoc = `<head><script>${load}<\/script><script src="${new URL(url, document.baseURI)}"><\/script></head>`
      document.documentElement.append(frame)
      this.postMessage = data => ready.then(() =>
        frame.contentWindow.dispatchEvent(new frame.contentWindow.MessageEvent("message", { data })))
      this.terminate = () => frame.remove()
    }
  }
}
