"""Quality of generated images, measured."""
