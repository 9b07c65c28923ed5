"""Learn to tell which caption and which companion belong to a video, and score samples by it."""
