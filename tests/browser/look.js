/* What a reader would stumble over in the open notebook: [cell index, complaint] for each. */
() => {
  const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)')
  const found = []

  const width = e => `${e.scrollWidth} px in ${e.clientWidth} px`
  const tooWide = e => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1

  // [selector inside a cell, element -> complaint or nothing]
  const looks = [
    ['.jp-InputArea-editor .cm-scroller', e => tooWide(e) && `code scrolls sideways (${width(e)})`],
    ['.jp-OutputArea-output', e => tooWide(e) && `output scrolls sideways (${width(e)})`],
    ['.jp-MarkdownOutput', e => tooWide(e) && `text scrolls sideways (${width(e)})`],
    ['.jp-mod-outputsScrolled', () => 'output scrolls inside its own box'],
    ['img', e => {
      const name = (e.getAttribute('alt') || e.getAttribute('src') || '').slice(0, 60)
      if (!e.complete || !e.naturalWidth) return `image is broken: ${name}`
      const cell = e.closest('.jp-Cell')
      if (e.getBoundingClientRect().right > cell.getBoundingClientRect().right + 1) return `image is clipped: ${name}`
    }],
    ['.jp-RenderedMarkdown', e => {
      const text = e.cloneNode(true)
      text.querySelectorAll('code, pre, mjx-container, svg, style').forEach(x => x.remove())
      const maths = text.textContent.match(/\$[^$\n]{1,80}\$|\$\$|\\(frac|sqrt|sum|begin|mathbf|in)\b/)
      if (maths) return `maths is not rendered: ${maths[0]}`
      const table = text.textContent.match(/\n\s*\|.*\|.*\|\s*\n/)
      if (table) return `table is not rendered: ${table[0].trim().slice(0, 60)}`
    }],
    ['mjx-merror, [data-mjx-error]', e => `maths has an error: ${e.getAttribute('data-mjx-error') || e.textContent}`],
    ['.jp-RenderedMermaid', e =>
      (e.classList.contains('jp-mod-warning') || !e.querySelector('img, svg')) && 'mermaid has an error'],
    ['code.language-mermaid, pre.language-mermaid', e => !e.closest('.jp-RenderedMermaid') && 'mermaid is not rendered'],
    ['[data-mime-type="application/vnd.jupyter.error"]', e => `error: ${e.textContent.trim().split('\n').pop().slice(0, 100)}`],
    ['[data-mime-type="application/vnd.jupyter.stderr"]', e => `stderr: ${e.textContent.trim().slice(0, 100)}`],
    ['.jp-OutputArea', e =>
      /Error displaying widget|Loading widget|Could not render/.test(e.textContent) && 'widget is not displayed'],
  ]

  panel.querySelectorAll('.jp-Cell').forEach((cell, index) => {
    for (const [selector, complaint] of looks)
      cell.querySelectorAll(selector).forEach(e => { const what = complaint(e); if (what) found.push([index, what]) })
  })
  return found
}
