"""What all of the package uses: errors, decoding of foreign bytes, files, output, progress."""
