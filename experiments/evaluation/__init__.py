"""What a network achieves on images, and which patches it looks at."""
