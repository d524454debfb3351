"""Generate pictures from an artifact, without torch: python generate.py ARTIFACT SEED OUTPUT.png"""

import sys

from PIL import Image

import ganexport


def main() -> None:
    """Save one picture, and stream a few more."""
    artifact, seed, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with ganexport.load(artifact) as generator:
        # [1, height, width, channels] uint8: the same picture for this seed on every backend.
        picture = generator.generate(1, seed)[0]
        # Any count in the memory of one batch.
        brightness = [float(batch.mean()) for batch in generator.stream(32, seed)]
    Image.fromarray(picture.squeeze()).save(output)
    assert "torch" not in sys.modules
    sys.stdout.write(f"{output}: {picture.shape[1]} x {picture.shape[0]}, {len(brightness)} batches streamed\n")


if __name__ == "__main__":
    main()
