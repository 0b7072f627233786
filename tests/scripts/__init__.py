"""Training scripts from public reports, each as a short function: what they rely on must hold."""
