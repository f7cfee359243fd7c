"""What ComfyUI reads of this pack besides its nodes, written from one source each.

python docs/authoring workflows     workflows/*.json and workflows/api/*.json
python docs/authoring thumbnails    workflows/*.jpg, by running the workflows that can run here
python docs/authoring pictures      web/docs/pictures/*.webp, in the browser, from a running ComfyUI
python docs/authoring pages         web/docs/*.md and locales/en/*.json

The nodes' ids, inputs and defaults come from their schemas, so ComfyUI has to be there
(COMFYUI_PATH, else comfy-cli's).  Tests hold the committed files to what these commands write.
"""
