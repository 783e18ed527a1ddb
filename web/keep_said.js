// What a node of ours said stays on it, and stays readable. Newer pages (1.58) take the text of a run away when the run ends;
// classic nodes leave it two lines where the node shows a picture, too.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const OURS = "$$attune-said"
const OF_THE_PAGE = "$$node-text-preview"
const TYPE = "progressText" // by which the page draws its own in Vue nodes
const ENDS = ["execution_success", "execution_error", "execution_interrupted"]
const AFTER_THE_PAGE = 500 // ms
const HEIGHT = 120 // of a text at least, in pixels

const said = new Map() // execution id of a node -> the text as the server sent it, for the run in progress

function nodeOf(id) {
    const path = String(id).split(":")
    let graph = app.graph
    for (const key of path.slice(0, -1)) graph = graph?.getNodeById(key)?.subgraph
    return graph?.getNodeById(path.at(-1))
}

const isOurs = (node) => (node?.comfyClass ?? node?.type ?? "").startsWith("Attune")
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

function forget(node) {
    const widget = widgetOf(node, OURS)
    if (!widget) return
    widget.onRemove?.()
    node.widgets.splice(node.widgets.indexOf(widget), 1)
}

function show(node, text) {
    const element = document.createElement("div")
    element.textContent = new DOMParser().parseFromString(text, "text/html").body.textContent
    element.style.cssText = "overflow: auto; white-space: pre-wrap; user-select: text; font-size: 10px; padding: 4px;"
    const widget = node.addDOMWidget(OURS, TYPE, element, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: () => HEIGHT,
        getValue: () => text,
        setValue: () => {},
    })
    widget.serialize = false
    node.setDirtyCanvas?.(true, true)
}

function giveRoom(node) {
    const options = widgetOf(node, OF_THE_PAGE)?.options
    if (options) options.getMinHeight = () => HEIGHT
}

function keep() {
    for (const [id, text] of said) {
        const node = nodeOf(id)
        if (isOurs(node) && text && !widgetOf(node, OF_THE_PAGE)) show(node, text)
    }
    said.clear()
}

app.registerExtension({
    name: "attune.KeepSaid",
    setup() {
        api.addEventListener("progress_text", ({ detail }) => {
            const node = nodeOf(detail.nodeId)
            if (!isOurs(node)) return
            forget(node)
            said.set(String(detail.nodeId), detail.text)
            setTimeout(() => giveRoom(node))
        })
        for (const end of ENDS) api.addEventListener(end, () => setTimeout(keep, AFTER_THE_PAGE))
    },
})
