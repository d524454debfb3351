"""Generators rebuilt from their papers, at tiny widths, with what a user would type to convert them."""

from typing import Any

#: name → what convert is told. Ranges are small so that corners are quick on one core.
GENERATORS: dict[str, dict[str, Any]] = {
    "stylegan2": {
        "inputs": ["z=normal[batch,32]"],
        "outputs": ["image=[-1,1]:NCHW"],
        "batch": "1:4:9",
        "truncation": 0.7,
    },
    "biggan": {
        "inputs": ["z=normal[batch,24]", "c=onehot(10)[batch,10]"],
        "outputs": ["image=[-1,1]:NCHW"],
        "batch": "1:4:9",
        "call": "truncation=0.43",
    },
    "sagan": {"inputs": ["z=normal[batch,32]"], "outputs": ["image=[-1,1]:NCHW"], "batch": "1:4:9"},
    "cyclegan": {
        "inputs": ["image=uniform(-1,1)[batch,3,height,width]"],
        "outputs": ["translated=[-1,1]:NCHW"],
        "batch": "1:1:3",
        "dims": ["height=16:32:48/4", "width=16:24:40/4"],
    },
    "pix2pix": {
        "inputs": ["image=uniform(-1,1)[batch,3,height,width]"],
        "outputs": ["translated=[-1,1]:NCHW"],
        "batch": "1:1:3",
        "dims": ["height=32:64:96/32", "width=32:32:96/32"],
    },
    "rrdbnet": {
        "inputs": ["x=uniform(0,1)[batch,3,height,width]"],
        "outputs": ["image=[0,1]:NCHW"],
        "batch": "1:1:3",
        "dims": ["height=5:16:24", "width=5:16:24"],
    },
    "hifigan": {
        "inputs": ["mel=normal[batch,20,frames]"],
        "outputs": ["audio=[-1,1]:NCT"],
        "batch": "1:1:3",
        "dims": ["frames=8:32:90"],
    },
    "textgan": {"inputs": ["z=normal[batch,16]"], "batch": "1:4:9"},
}
