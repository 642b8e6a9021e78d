/* What a reader would stumble over on a page of the website: one complaint for each. */
() => {
  const page = document.querySelector('[role=main]') || document.body
  const found = []
  const say = (what, e) => found.push(`${what}: ${(e.getAttribute('alt') || e.textContent || e.src || '').trim().slice(0, 80)}`)

  document.querySelectorAll('img').forEach(e => {
    if (!e.complete || !e.naturalWidth) say('image is broken', e)
  })
  page.querySelectorAll('mjx-merror, [data-mjx-error]').forEach(e => say('maths has an error', e))
  page.querySelectorAll('.math').forEach(e => { if (!e.querySelector('mjx-container')) say('maths is not rendered', e) })
  page.querySelectorAll('pre.mermaid').forEach(e => { if (!e.querySelector('svg')) say('diagram is not drawn', e) })
  page.querySelectorAll('a[href]').forEach(e => {
    if (/\.(ipynb|md)(#|$)/.test(e.getAttribute('href'))) say('link leads to a source file', e)
  })
  const text = page.cloneNode(true)
  text.querySelectorAll('code, pre, mjx-container, svg, style, script, .output').forEach(e => e.remove())
  const maths = text.textContent.match(/\$[^$\n]{1,80}\$|\$\$|\\(frac|sqrt|sum|begin|mathbf)\b/)
  if (maths) found.push(`maths is not rendered: ${maths[0]}`)
  const table = text.textContent.match(/\n\s*\|.*\|.*\|\s*\n/)
  if (table) found.push(`table is not rendered: ${table[0].trim().slice(0, 60)}`)
  const root = document.documentElement
  if (root.scrollWidth > root.clientWidth + 1)
    found.push(`page scrolls sideways: ${root.scrollWidth} px in ${root.clientWidth} px`)
  return found
}
