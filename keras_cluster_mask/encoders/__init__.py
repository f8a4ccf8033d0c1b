"""What is known of encoders: families, maskings inside of them, pooling, towers."""
