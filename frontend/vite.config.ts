import { defineConfig } from "vitest/config";

export default defineConfig({
  base: "./", // the page works under any path
  logLevel: "warn",
  build: {
    outDir: "../src/petals_chat/web",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0, // the security policy allows no data: addresses but images
    modulePreload: { polyfill: false },
    manifest: "manifest.json",
  },
  test: { include: ["tests/**/*.test.ts"], environment: "node" },
});
