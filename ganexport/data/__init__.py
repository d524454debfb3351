"""Training data: embedded MNIST, idx files, image folders, arrays."""
